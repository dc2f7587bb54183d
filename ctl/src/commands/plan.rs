// SPDX-License-Identifier: Apache-2.0
//! `salvor plan`: what an action would do.

use salvor_proto::v1::{self, plan_action_request::Action};

use super::Session;
use crate::{
    cli::PlanCommand,
    connect::{ask, repeat},
    errors::Failure,
    output::{show, table::Table, text::clean},
    requests,
    units::{from_api, show_duration},
};

/// Asks for the plan and writes it.
pub(super) async fn run(session: &Session, command: PlanCommand) -> Result<(), Failure> {
    let action = match command {
        PlanCommand::Create(args) => Action::Create(requests::create(&args)?),
        PlanCommand::Adopt(args) => Action::Adopt(requests::adopt(&args)),
        PlanCommand::Release(args) => Action::Release(requests::release(&args)),
        PlanCommand::Delete(args) => Action::Delete(requests::delete(&args)),
        PlanCommand::Start(args) => Action::Start(requests::start(&args)),
        PlanCommand::Stop(args) => Action::Stop(requests::stop(&args)),
        PlanCommand::Rescue(args) => Action::Rescue(requests::rescue(&args)?),
        PlanCommand::Unrescue(args) => Action::Unrescue(requests::unrescue(&args)),
        PlanCommand::Reboot(args) => Action::Reboot(requests::reboot(&args)),
        PlanCommand::Pause(args) => Action::Pause(requests::pause(&args.server)),
        PlanCommand::Unpause(args) => Action::Unpause(requests::unpause(&args.server)),
        PlanCommand::Suspend(args) => Action::Suspend(requests::suspend(&args.server)),
        PlanCommand::Resume(args) => Action::Resume(requests::resume(&args.server)),
        PlanCommand::CrashDump(args) if args.to_host => {
            Action::DumpMemory(requests::dump_memory(&args.server))
        }
        PlanCommand::CrashDump(args) => {
            Action::TriggerCrashDump(requests::crash_dump(&args.server))
        }
        PlanCommand::SetPassword(args) => Action::ChangePassword(requests::set_password(&args)?),
        PlanCommand::Lock(args) => Action::Lock(requests::lock(&args)),
        PlanCommand::Unlock(args) => Action::Unlock(requests::unlock(&args)),
        PlanCommand::Update(args) => Action::Update(requests::update(&args)?),
        PlanCommand::ResetState(args) => Action::ResetState(requests::reset_state(&args)),
        PlanCommand::Restore(args) => Action::Restore(requests::restore(&args)),
        PlanCommand::ForceDelete(args) => Action::ForceDelete(requests::force_delete(&args)),
        PlanCommand::AcceptDrift(args) => Action::AcceptDrift(requests::accept_drift(args.server)),
        PlanCommand::RestoreDefinition(args) => {
            Action::RestoreDefinition(requests::restore_definition(args.server))
        }
    };
    let request = v1::PlanActionRequest {
        action: Some(action),
    };
    let plan = repeat(&session.ui, async || {
        session
            .agent
            .servers()
            .plan_action(ask(request.clone()))
            .await
    });
    let plan = plan.await?;
    session
        .ui
        .result(&plan, |plan| text(plan, session.ui.colour()))?;
    if plan.accepted {
        Ok(())
    } else {
        Err(Failure::PlanRefused)
    }
}

fn text(plan: &v1::PlanActionResponse, colour: bool) -> String {
    let mut text = String::new();
    if plan.accepted {
        text.push_str("The action would be accepted.\n");
    } else {
        text.push_str("The action would be refused:\n");
        for refusal in &plan.refusals {
            text.push_str(&format!(
                "  {}: {}\n",
                clean(&refusal.reason),
                clean(&refusal.message)
            ));
        }
    }
    if !plan.overtakes.is_empty() {
        text.push_str(&format!(
            "First {} would be cancelled and taken back.\n",
            clean(&plan.overtakes)
        ));
    }
    for warning in &plan.warnings {
        text.push_str(&format!(
            "Warning: {} ({})\n",
            clean(&warning.message),
            clean(&warning.name)
        ));
    }
    if !plan.steps.is_empty() {
        let mut table = Table::new(&["#", "PHASE", "STEP", "AT MOST", "WHAT"]);
        for (number, step) in (1_usize..).zip(&plan.steps) {
            table.row([
                number.to_string(),
                step.phase.clone(),
                step.kind.clone(),
                step.deadline
                    .as_ref()
                    .and_then(from_api)
                    .map(show_duration)
                    .unwrap_or_default(),
                step.description.clone(),
            ]);
        }
        text.push_str(&format!("\nSteps:\n{}", table.render()));
    }
    if !plan.changes.is_empty() {
        let mut table = Table::new(&["FIELD", "NOW", "THEN"]);
        for change in &plan.changes {
            table.row([
                change.field.clone(),
                change.before.clone(),
                change.after.clone(),
            ]);
        }
        text.push_str(&format!("\nThe record:\n{}", table.render()));
    }
    if let Some(report) = &plan.host {
        text.push_str(&format!("\nThe host:\n{}", show::host_report(report)));
    }
    if !plan.files.is_empty() {
        text.push_str("\nFiles:\n");
        for file in &plan.files {
            text.push_str(&format!(
                "  {:<8}{}\n",
                clean(&file.effect),
                clean(&file.path)
            ));
        }
    }
    if !plan.domain_diff.is_empty() {
        text.push_str(&format!(
            "\nDomain definition:\n{}",
            diff(&plan.domain_diff, colour)
        ));
    }
    text
}

/// A unified diff, each line cleaned and, if wanted, coloured by what it does.
pub(super) fn diff(diff: &str, colour: bool) -> String {
    let mut text = String::new();
    for line in diff.lines() {
        // Indentation by tabs is harmless.
        let shown: Vec<_> = line.split('\t').map(clean).collect();
        let shown = shown.join("\t");
        let paint = match line.as_bytes() {
            [b'+', b'+', b'+', ..] | [b'-', b'-', b'-', ..] => "\x1b[1m",
            [b'@', ..] => "\x1b[36m",
            [b'+', ..] => "\x1b[32m",
            [b'-', ..] => "\x1b[31m",
            _ => "",
        };
        if colour && !paint.is_empty() {
            text.push_str(&format!("{paint}{shown}\x1b[0m\n"));
        } else {
            text.push_str(&format!("{shown}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_is_coloured_only_if_wanted_and_always_cleaned() {
        let given = "--- a\n+++ b\n@@ -1 +1 @@\n-\tx\x1b[2J\n+y\n z\n";
        assert_eq!(
            diff(given, false),
            "--- a\n+++ b\n@@ -1 +1 @@\n-\tx\\u{1b}[2J\n+y\n z\n"
        );
        assert_eq!(
            diff(given, true),
            "\x1b[1m--- a\x1b[0m\n\x1b[1m+++ b\x1b[0m\n\x1b[36m@@ -1 +1 @@\x1b[0m\n\
             \x1b[31m-\tx\\u{1b}[2J\x1b[0m\n\x1b[32m+y\x1b[0m\n z\n"
        );
    }
}
