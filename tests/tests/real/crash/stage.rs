// SPDX-License-Identifier: Apache-2.0
//! A server to play cases with, and how it must be after one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    OperationState, OperationStep, PlanActionRequest, PowerState, StepState, VmState,
    plan_action_request::Action,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Ended};
use salvor_tests::console::Mark;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use tonic::Status;

use super::cases::{Case, Cut, Script};
use crate::actor::{Actor, FIXER, Kind, tiny};
use crate::scene::{Scene, files_below};

/// A domain and an agent to play cases with. Between cases the server is ACTIVE, and the agent is down.
pub(super) struct Stage {
    pub(super) actor: Actor,
    pub(super) scene: Scene<'static>,
}

impl Stage {
    pub(super) async fn new(folder: &RunFolder, name: &str) -> Self {
        let host = TestHost::shared();
        let folder = folder.join(name);
        let settings = AgentSettings::default();
        let (actor, mut scene) = Scene::with_actor(host, &folder, &tiny(name), settings).await;
        scene.agent.kill_9();
        Self { actor, scene }
    }

    /// The same with a server that the agent makes.
    pub(super) async fn made(folder: &RunFolder, name: &str, kind: Kind) -> Self {
        let host = TestHost::shared();
        let folder = folder.join(name);
        let mut scene = Scene::on(host, &folder, AgentSettings::default()).await;
        scene.import_fixer().await;
        let actor = Actor::made(&mut scene, name, kind).await;
        scene.agent.kill_9();
        Self { actor, scene }
    }

    /// Deletes a server that the agent made, and looks for what is left of it.
    pub(super) async fn delete(mut self) {
        self.scene.start_with("").await;
        self.scene.client.delete(self.actor.id).await.done();
        assert!(self.scene.libvirt.state(self.actor.id).is_err());
        let servers = self.scene.agent.state_folder().join("servers");
        assert_eq!(files_below(&servers), Vec::<PathBuf>::new());
        assert_eq!(self.scene.references(&self.actor.name).await, 0);
    }

    /// The steps of what a script does, as a dry run tells them: their kinds, and which clean up.
    pub(super) async fn steps(&mut self, action: &Action) -> Vec<(String, bool)> {
        let plan = PlanActionRequest {
            action: Some(action.clone()),
        };
        let planned = self.scene.client.servers.plan_action(plan).await.unwrap();
        let planned = planned.into_inner();
        assert!(planned.accepted, "{planned:#?}");
        let steps = planned.steps.into_iter();
        steps
            .map(|step| (step.kind, step.phase == "clean-up"))
            .collect()
    }

    pub(super) async fn submit(&mut self, action: &Action) -> Result<Operation, Status> {
        let servers = &mut self.scene.client.servers;
        let operation = match action.clone() {
            Action::Rescue(request) => servers.rescue_server(request).await?.into_inner().operation,
            Action::Unrescue(request) => {
                servers
                    .unrescue_server(request)
                    .await?
                    .into_inner()
                    .operation
            }
            other => panic!("no script does {other:?}"),
        };
        Ok(operation.expect("an action's answer has an operation"))
    }

    pub(super) async fn rescue(&mut self, script: Script) -> Ended {
        let action = script.action(&self.actor);
        let operation = self.submit(&action).await.unwrap();
        let ended = self.scene.client.wait(&operation).await;
        ended.done();
        ended
    }

    /// Rescues with overlays, and sees to it that there is a repair in them.
    pub(super) async fn rescue_with_repair(&mut self) -> Operation {
        let mark = self.actor.console().mark();
        let rescue = self.rescue(Script::StableOverlay).await;
        self.actor.wait_ready(mark, FIXER);
        if self.actor.kind != Kind::Adopted {
            // The rescue guest does not see the disk.
            let id = self.actor.id;
            self.scene.libvirt.destroy(id).unwrap();
            self.scene.wait_power(id, PowerState::Shutdown).await;
            let mut files = self.scene.files_of(id).into_iter();
            let overlay = files.find(|file| file.extension().is_some_and(|e| e == "overlay"));
            self.actor.mark_overlay(&overlay.unwrap());
            let mark = self.actor.console().mark();
            self.scene.libvirt.start(id).unwrap();
            self.actor.wait_ready(mark, FIXER);
            self.scene.wait_power(id, PowerState::Running).await;
        }
        rescue.operation
    }

    /// Brings a server that is RESCUED back; checks that it is, and that its disk is `marked`.
    pub(super) async fn unrescue(&mut self, script: Script, marked: bool) {
        let (mark, number) = (self.actor.console().mark(), self.actor.number());
        let request = self.actor.unrescue_request(script.overlay());
        self.scene.client.unrescue(request).await.done();
        self.scene.assert_original(&self.actor, mark, number).await;
        assert_eq!(self.actor.is_marked(), marked);
    }

    /// Brings a server in ERROR back.
    pub(super) async fn repair(&mut self, script: Script) {
        self.scene.restart_with("").await;
        let server = self.scene.client.get(self.actor.id).await;
        let (mark, number) = (self.actor.console().mark(), self.actor.number());
        if server.rescue.is_some() {
            let request = self.actor.unrescue_request(script.overlay());
            self.scene.client.unrescue(request).await.done();
        } else {
            self.scene
                .client
                .stop(self.actor.id, Some(Duration::ZERO))
                .await
                .done();
            self.scene.client.start(self.actor.id).await.done();
        }
        // What a failed roll-back left of files goes at the next start.
        self.scene.restart_with("").await;
        self.scene.assert_original(&self.actor, mark, number).await;
    }

    /// Plays one case, from ACTIVE to ACTIVE.
    pub(super) async fn play(&mut self, case: &Case) -> OperationState {
        let script = case.script;
        if self.actor.kind == Kind::Adopted {
            self.actor.remove_mark();
        }
        self.scene.start_with(&case.failpoints()).await;
        let rescue = match script {
            Script::ClassicReadWrite | Script::StableOverlay => None,
            Script::Discard | Script::Commit => Some(self.rescue_with_repair().await),
        };

        let (mark, number) = (self.actor.console().mark(), self.actor.number());
        let action = script.action(&self.actor);
        let first = self.submit(&action).await;
        match case.cut {
            Cut::Kill | Cut::FailAndKill => {
                assert_eq!(self.scene.agent.wait_end(SOON), "signal 9");
                self.scene.start_with("").await;
            }
            Cut::Fail | Cut::Cancel | Cut::FailTwice | Cut::FailCleanUp => {}
        }
        // The same request again, also after a restart, is the same operation.
        let operation = self.submit(&action).await.unwrap();
        if let Ok(first) = first {
            assert_eq!(operation.name, first.name);
        }
        let ended = self.scene.client.wait(&operation).await;
        let state = ended.metadata.state();
        match case.cut {
            Cut::Kill => assert!(
                matches!(state, OperationState::Done | OperationState::Failed),
                "{ended:#?}"
            ),
            Cut::Fail | Cut::FailAndKill | Cut::FailTwice => {
                assert_eq!(state, OperationState::Failed, "{ended:#?}");
            }
            Cut::Cancel => assert_eq!(state, OperationState::Cancelled, "{ended:#?}"),
            Cut::FailCleanUp => {
                ended.done();
                let left_behind =
                    |warning: &salvor_proto::v1::Warning| warning.name == "LEFT_BEHIND";
                assert!(
                    ended.metadata.warnings.iter().any(left_behind),
                    "{ended:#?}"
                );
                self.scene.restart_with("").await;
            }
        }

        let cannot_be_taken_back = |step: &&OperationStep| step.state() == StepState::RevertFailed;
        let stuck = ended.metadata.steps.iter().find(cannot_be_taken_back);
        let untouched =
            |step: &OperationStep| step.phase == "prepare" && step.kind != "SaveDefinition";
        if case.cut == Cut::FailTwice && stuck.is_some_and(untouched) {
            // No guest was touched: it is as before, and the next start takes what is left behind.
            self.scene.restart_with("").await;
            self.check_as_before(&ended, rescue.as_ref(), script, mark, number)
                .await;
        } else if case.cut == Cut::FailTwice {
            let server = self.scene.client.get(self.actor.id).await;
            Client::assert_settled(&server, VmState::Error);
            let fault = server.fault.unwrap();
            assert_eq!(fault.reason, "ROLLBACK_FAILED");
            assert!(
                !fault.step.is_empty() && !fault.left_behind.is_empty(),
                "{fault:#?}"
            );
            self.repair(script).await;
        } else if state == OperationState::Done {
            self.check_done(script, &operation, mark, number).await;
        } else {
            self.check_as_before(&ended, rescue.as_ref(), script, mark, number)
                .await;
        }
        self.scene.agent.kill_9();
        state
    }

    pub(super) async fn check_done(
        &mut self,
        script: Script,
        operation: &Operation,
        mark: Mark,
        number: Option<u32>,
    ) {
        match script {
            Script::ClassicReadWrite | Script::StableOverlay => {
                self.scene
                    .assert_rescued(&self.actor, operation, mark, number)
                    .await;
                let mut marked = false;
                match self.actor.kind {
                    Kind::Adopted => {
                        let said = self.actor.console().since(mark);
                        assert!(said.contains("TINY-MARKED "), "{said}");
                        marked = script == Script::ClassicReadWrite;
                    }
                    Kind::Made => {}
                    Kind::MadeUefi => self.check_variables(),
                }
                assert_eq!(self.actor.is_marked(), marked);
                self.unrescue(script, marked).await;
            }
            Script::Discard | Script::Commit => {
                self.scene.assert_original(&self.actor, mark, number).await;
                assert_eq!(self.actor.is_marked(), script == Script::Commit);
            }
        }
    }

    /// The rescue has a copy of the server's UEFI variables, and leaves the server's own alone.
    fn check_variables(&self) {
        let live = self.actor.libvirt.live_xml(self.actor.id).unwrap();
        let files = self.scene.files_of(self.actor.id);
        let variables: Vec<_> = files
            .iter()
            .filter(|file| file.ends_with("nvram.fd"))
            .collect();
        let [own, copy] = variables.as_slice() else {
            panic!("{variables:?}");
        };
        assert!(live.contains(copy.to_str().unwrap()), "{live}");
        assert!(!live.contains(own.to_str().unwrap()), "{live}");
        let size = |file: &Path| fs::metadata(file).unwrap().len();
        assert_eq!(size(own), size(copy));
    }

    pub(super) async fn check_as_before(
        &mut self,
        ended: &Ended,
        rescue: Option<&Operation>,
        script: Script,
        mark: Mark,
        number: Option<u32>,
    ) {
        let touched = ended
            .metadata
            .steps
            .iter()
            .any(|step| step.kind == "PowerOff" && step.state() != StepState::Pending);
        if !touched {
            assert_eq!(self.actor.number(), number, "the guest was touched in vain");
        }
        let Some(rescue) = rescue else {
            self.scene.assert_original(&self.actor, mark, number).await;
            let said = self.actor.console().since(mark);
            // The rescue guest may have been ended between writing and saying so.
            let marked = self.actor.is_marked();
            if script == Script::StableOverlay || !said.contains("TINY-UP") {
                assert!(!marked, "{said}");
            } else if said.contains("TINY-MARKED ") {
                assert!(marked, "{said}");
            }
            return;
        };
        self.scene
            .assert_rescued(&self.actor, rescue, mark, number)
            .await;
        if script == Script::Discard {
            assert!(!self.actor.is_marked());
        } else {
            // The commit may have been done already: the overlay shows the same disk either way.
            self.actor.is_marked();
        }
        // Without failpoints.
        self.scene.restart_with("").await;
        self.unrescue(script, script == Script::Commit).await;
    }
}
