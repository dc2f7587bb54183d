// SPDX-License-Identifier: Apache-2.0
//! What is cut off, where, and how: the cases of a plan.

use salvor_proto::v1::{
    DiskProtection, OverlayDisposition, RescueBus, RescueMode, plan_action_request::Action,
};

use crate::actor::Actor;

/// What is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Script {
    ClassicReadWrite,
    StableOverlay,
    Discard,
    Commit,
}

impl Script {
    pub(super) const ALL: [Self; 4] = [
        Self::ClassicReadWrite,
        Self::StableOverlay,
        Self::Discard,
        Self::Commit,
    ];

    pub(super) const fn verb(self) -> &'static str {
        match self {
            Self::ClassicReadWrite | Self::StableOverlay => "rescue",
            Self::Discard | Self::Commit => "unrescue",
        }
    }

    /// What becomes of the overlays in the end.
    pub(super) const fn overlay(self) -> OverlayDisposition {
        match self {
            Self::ClassicReadWrite => OverlayDisposition::Unspecified,
            Self::StableOverlay | Self::Discard => OverlayDisposition::Discard,
            Self::Commit => OverlayDisposition::Commit,
        }
    }

    /// The request for the action.
    pub(super) fn action(self, actor: &Actor) -> Action {
        match self {
            Self::ClassicReadWrite => {
                let mut request = actor.rescue_request(DiskProtection::ReadWrite);
                request.mode = RescueMode::Classic.into();
                Action::Rescue(request)
            }
            Self::StableOverlay => {
                let mut request = actor.rescue_request(DiskProtection::Overlay);
                request.mode = RescueMode::Stable.into();
                request.bus = RescueBus::Virtio.into();
                Action::Rescue(request)
            }
            Self::Discard | Self::Commit => {
                Action::Unrescue(actor.unrescue_request(self.overlay()))
            }
        }
    }
}

/// How the operation is cut off, and so how it may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// The agent dies: done or as before.
    Kill,
    /// A step fails: as before.
    Fail,
    /// Somebody cancels: as before.
    Cancel,
    /// A step fails, and the agent dies while it takes back: as before.
    FailAndKill,
    /// A step of the clean-up fails: done, and what is left goes at the next start.
    FailCleanUp,
    /// A step fails and so does taking one back: ERROR, from which there is a way out.
    FailTwice,
}

#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) script: Script,
    pub(super) cut: Cut,
    /// Failpoints without their verb.
    pub(super) points: Vec<String>,
}

impl Case {
    pub(super) fn failpoints(&self) -> String {
        let verb = self.script.verb();
        let points: Vec<String> = self
            .points
            .iter()
            .map(|point| format!("{verb}:{point}"))
            .collect();
        points.join(",")
    }
}

/// The points at which an agent can die in a plan of so many steps, of which so many come before the outcome.
pub(crate) fn points(steps: usize, before_commit: usize) -> Vec<String> {
    let mut points = Vec::new();
    for step in 0..steps {
        points.push(format!("before-step:{step}"));
        points.push(format!("after-step:{step}"));
    }
    points.extend(["before-commit".to_owned(), "after-commit".to_owned()]);
    if steps > before_commit {
        points.push("before-finish".to_owned());
    }
    points
}

/// Every case of a script whose plan has so many steps, of which so many come before the outcome.
pub(super) fn cases(script: Script, steps: usize, before_commit: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |cut: Cut, points: &[String]| {
        cases.push(Case {
            script,
            cut,
            points: points.to_vec(),
        });
    };
    for point in points(steps, before_commit) {
        add(Cut::Kill, &[format!("{point}:kill")]);
    }
    for step in 0..before_commit {
        add(Cut::Fail, &[format!("before-step:{step}:fail")]);
        add(Cut::Fail, &[format!("after-step:{step}:fail")]);
    }
    add(Cut::Fail, &["before-commit:fail".into()]);
    for step in 0..before_commit {
        add(Cut::Cancel, &[format!("before-step:{step}:cancel")]);
    }
    let last = before_commit.saturating_sub(1);
    add(Cut::Cancel, &[format!("after-step:{last}:cancel")]);
    for step in before_commit..steps {
        add(Cut::FailCleanUp, &[format!("before-step:{step}:fail")]);
    }
    for step in 0..before_commit {
        for place in ["before-revert", "after-revert"] {
            add(
                Cut::FailAndKill,
                &["before-commit:fail".into(), format!("{place}:{step}:kill")],
            );
        }
        add(
            Cut::FailAndKill,
            &[
                format!("before-step:{step}:fail"),
                "before-finish:kill".into(),
            ],
        );
        add(
            Cut::FailTwice,
            &[
                "before-commit:fail".into(),
                format!("before-revert:{step}:fail"),
            ],
        );
    }
    cases
}

/// The cases of a plan with these steps that differ for a server that the agent made: those round the steps
/// that are about files, which now lie beside the server's own, and about its definition. With
/// `firmware_only`, those of them that a firmware of its own makes differ again.
pub(super) fn cases_of_files(
    script: Script,
    steps: &[(String, bool)],
    firmware_only: bool,
) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |cut: Cut, points: Vec<String>| {
        cases.push(Case {
            script,
            cut,
            points,
        });
    };
    for (index, (kind, cleans_up)) in steps.iter().enumerate() {
        if steps[..index].iter().any(|(before, _)| before == kind) {
            continue;
        }
        let before = format!("before-step:{index}");
        let after = format!("after-step:{index}:kill");
        let undo = format!("before-revert:{index}");
        let back = |then: String| vec!["before-commit:fail".to_owned(), then];
        match kind.as_str() {
            "MakeFolder" | "CreateOverlay" | "CommitOverlay" if firmware_only => {}
            "MakeFolder" | "CreateOverlay" | "CopyFile" => {
                add(Cut::Kill, vec![after]);
                add(Cut::FailAndKill, back(format!("{undo}:kill")));
            }
            "CommitOverlay" => {
                add(Cut::Kill, vec![format!("{before}:kill")]);
                add(Cut::Kill, vec![after]);
                add(Cut::Fail, vec![format!("{before}:fail")]);
            }
            "DefineDomain" => {
                add(Cut::Kill, vec![after]);
                add(Cut::FailAndKill, back(format!("{undo}:kill")));
                add(Cut::FailTwice, back(format!("{undo}:fail")));
            }
            "RemoveFolder" if *cleans_up => {
                add(Cut::Kill, vec![format!("{before}:kill")]);
                add(Cut::Kill, vec![after]);
                add(Cut::FailCleanUp, vec![format!("{before}:fail")]);
            }
            _ => {}
        }
    }
    cases
}
