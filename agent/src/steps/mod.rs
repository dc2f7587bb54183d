// SPDX-License-Identifier: Apache-2.0
//! What each step does on the host. One file per family.
//!
//! Every function here is idempotent: a step may be applied after it was applied in part by an agent
//! that died, and taken back although it never began.

mod disks;
mod domain;
mod files;
mod memory;
mod records;
mod sweep;
mod work;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::Semaphore;
use uuid::Uuid;

use disks::Base;
use domain::Way;
pub use sweep::sweep;
use work::{FileJob, FileWork};

use crate::{
    console::BootNotes,
    core::{
        layout::Layout,
        plan::{PlannedStep, Step},
        reason::{Reason, Refusal},
        state::PowerState,
    },
    engine::{StepContext, StepError, StepReport, StepRunner},
    hypervisor::{Boot, Hypervisor, HypervisorError, LinkState},
    storage::qemu_img::QemuImg,
    store::{Store, StoreError},
};

/// How often it is looked whether a call that was given up on has come back.
const STUCK_PAUSE: Duration = Duration::from_millis(100);

/// So many boots of a server are told apart unless it is said otherwise (see `console`).
const BOOTS: u32 = 10;

/// The host that steps work on.
pub struct Steps {
    hypervisor: Arc<dyn Hypervisor>,
    store: Store,
    qemu_img: QemuImg,
    layout: Layout,
    files: FileWork,
    boots: BootNotes,
    long_jobs: Semaphore,
}

impl Steps {
    /// Steps on this host.
    #[must_use]
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        store: Store,
        qemu_img: QemuImg,
        layout: Layout,
    ) -> Self {
        Self {
            boots: BootNotes::new(layout.clone(), BOOTS),
            hypervisor,
            store,
            qemu_img,
            layout,
            files: FileWork::default(),
            long_jobs: Semaphore::new(memory::LONG_JOBS),
        }
    }

    /// Where guests' boots are noted, if not as many of them as usual are kept.
    #[must_use]
    pub fn with_boots(mut self, boots: BootNotes) -> Self {
        self.boots = boots;
        self
    }
}

#[async_trait]
impl StepRunner for Steps {
    async fn apply(&self, context: StepContext<'_>, step: &Step) -> Result<StepReport, StepError> {
        let (server, plan) = (context.plan.server, context.plan.id);
        let job = || FileJob::apply(server, step);
        match step {
            Step::HoldImage {
                image,
                path,
                size,
                holder,
            } => {
                self.hold_image(&context, job(), *image, (path, *size), holder)
                    .await
            }
            Step::MakeFolder { path } => self.make_folder(job(), path).await,
            Step::CreateOverlay {
                path,
                backing,
                backing_format,
                backing_references,
                size,
            } => {
                let base = Base::new(backing, backing_format, backing_references)?;
                self.create_overlay(job(), path, base, *size).await
            }
            Step::CopyFile { from, to } => self.copy_file(&context, job(), from, to).await,
            Step::BuildConfigDrive { path, drive } => {
                self.build_config_drive(job(), path, drive).await
            }
            Step::SaveDefinition { xml } => self.save_definition(server, plan, xml).await,
            Step::PowerOff {
                shutdown,
                ask_agent,
                or_fail,
                ..
            } => {
                self.expects_definition(context.plan).await?;
                let way = Way {
                    shutdown: *shutdown,
                    ask_agent: *ask_agent,
                    or_fail: *or_fail,
                };
                self.power_off(&context, way).await
            }
            Step::ReserveNote { disks, note } => self.reserve_note(job(), disks, note).await,
            Step::NoteOwners { disks, note } => self.note_owners(job(), disks, note).await,
            Step::PutOwnersBack { note } => self.put_owners_back(job(), note).await,
            Step::MarkCommitStarted => self.mark_commit_started(server).await,
            Step::CommitOverlay {
                path,
                base,
                base_format,
                base_references,
            } => {
                let base = Base::new(base, base_format, base_references)?;
                self.commit_overlay(&context, job(), path, base).await
            }
            Step::EmptyOverlay {
                path,
                base,
                base_format,
            } => self.empty_overlay(job(), path, base, base_format).await,
            Step::DefineDomain { xml, mark, before } => {
                self.define(context.plan, xml, *mark, before.as_deref())
                    .await
            }
            Step::UndefineDomain { tpm_goes, .. } => self.undefine(server, *tpm_goes).await,
            Step::StartDomain { mark, fresh } => {
                let started = self.start(context.plan, *mark, boot(*fresh)).await?;
                self.sync_defined(context.plan).await?;
                Ok(started)
            }
            Step::DropSavedMemory => self.drop_saved_memory(server).await,
            Step::SetUserPassword { user, hash } => {
                self.set_user_password(server, user, hash).await
            }
            Step::RemoveFolder { path } => self.remove_folder(job(), path).await,
            Step::ReleaseImage { image, holder } => self.release_image(*image, holder).await,
            Step::DropSavedDefinition => self.drop_saved_definition(server).await,
            Step::Pause { .. } => self.pause(server).await,
            Step::Unpause => self.unpause(server).await,
            Step::SaveMemory { .. } => self.save_memory(&context, step).await,
            Step::RestoreMemory { .. } => self.restore_memory(&context, step).await,
            Step::SetGuestTime => self.set_guest_time(server).await,
            Step::InjectNmi => self.inject_nmi(server).await,
            Step::DumpMemory { path, .. } => self.dump_memory(&context, step, path).await,
            Step::KnowDefinition { xml } => self.know_definition(server, plan, xml).await,
        }
        .map(|report| report.unwrap_or_default())
    }

    async fn revert(&self, context: StepContext<'_>, step: &Step) -> Result<(), StepError> {
        let (server, plan) = (context.plan.server, context.plan.id);
        let job = || FileJob::revert(server, step);
        match step {
            Step::HoldImage { image, holder, .. } => {
                self.release_image(*image, holder).await.map(|_| ())
            }
            Step::MakeFolder { path } => self.remove_folder(job(), path).await.map(|_| ()),
            Step::CreateOverlay { path, .. }
            | Step::CopyFile { to: path, .. }
            | Step::BuildConfigDrive { path, .. } => self.remove_file(job(), path).await,
            Step::SaveDefinition { .. } => self.drop_definition_of(server, plan).await,
            Step::PowerOff { was_on: false, .. } => Ok(()),
            Step::PowerOff {
                was_on: true,
                shutdown,
                ..
            } => {
                // A plan that defines may have left memory behind that was saved of the other
                // definition; any other has no reason to lose what was saved.
                let defines = |step: &PlannedStep| matches!(step.step, Step::DefineDomain { .. });
                let boot = boot(context.plan.steps.iter().any(defines));
                self.power_on_again(&context, *shutdown, boot).await
            }
            // It goes with its folder.
            Step::ReserveNote { .. } => Ok(()),
            Step::NoteOwners { note, .. } => self.put_owners_back(job(), note).await.map(|_| ()),
            // libvirt gives them to the guest that is started again.
            Step::PutOwnersBack { .. } => Ok(()),
            // The overlays show the same disk as before, however much of them was written.
            Step::MarkCommitStarted | Step::CommitOverlay { .. } => Ok(()),
            // It was to be discarded, and what it stands on may have changed since.
            Step::EmptyOverlay { .. } => Ok(()),
            Step::DefineDomain { xml, mark, before } => {
                self.define_again(server, xml, *mark, before.as_deref())
                    .await
            }
            Step::UndefineDomain { before, .. } => self.define_removed(server, before).await,
            Step::StartDomain { mark, .. } => self.stop_started(server, *mark).await,
            // Where there was some, the guest boots again instead of going on.
            Step::DropSavedMemory => Ok(()),
            // The password before is not known, and a rescue guest that takes another one is no worse.
            Step::SetUserPassword { .. } => Ok(()),
            // It goes with the operation.
            Step::KnowDefinition { .. } => Ok(()),
            // Clean-up is never taken back.
            Step::RemoveFolder { .. } | Step::ReleaseImage { .. } | Step::DropSavedDefinition => {
                Ok(())
            }
            Step::Pause { was_running: true } => self.unpause_again(server).await,
            Step::Pause { was_running: false } => Ok(()),
            Step::Unpause => self.pause_again(server).await,
            Step::SaveMemory { .. } => self.go_on_again(&context, step).await,
            // What it brought back stays: ending it would lose the memory.
            Step::RestoreMemory { .. } => Ok(()),
            // Neither can be taken out of a guest.
            Step::SetGuestTime | Step::InjectNmi => Ok(()),
            Step::DumpMemory { path, .. } => self.remove_file(job(), path).await,
        }
    }

    async fn observe(&self, context: StepContext<'_>, step: &Step) -> Result<bool, StepError> {
        let server = context.plan.server;
        match step {
            Step::PowerOff { .. } => self.is_off(server).await,
            Step::DefineDomain { xml, mark, .. } => self.is_defined(context.plan, xml, *mark).await,
            Step::UndefineDomain { .. } => self.is_undefined(server).await,
            Step::StartDomain { mark, .. } => {
                let started = self.is_started(server, *mark).await?;
                if started {
                    self.sync_defined(context.plan).await?;
                }
                Ok(started)
            }
            Step::Pause { .. } => self.has_power(server, PowerState::Paused).await,
            Step::Unpause => self.has_power(server, PowerState::Running).await,
            Step::SaveMemory { .. } => self.is_saved(server).await,
            Step::RestoreMemory { .. } => self.runs_its_own(server).await,
            // Whether the guest got it nobody can tell, and a second one may end its dump: at most once.
            Step::InjectNmi => Ok(true),
            // Cheap to do again, and what is half there cannot be told from what is whole.
            Step::HoldImage { .. }
            | Step::MakeFolder { .. }
            | Step::CreateOverlay { .. }
            | Step::CopyFile { .. }
            | Step::BuildConfigDrive { .. }
            | Step::SaveDefinition { .. }
            | Step::ReserveNote { .. }
            | Step::NoteOwners { .. }
            | Step::PutOwnersBack { .. }
            | Step::MarkCommitStarted
            | Step::CommitOverlay { .. }
            | Step::EmptyOverlay { .. }
            | Step::DropSavedMemory
            | Step::SetUserPassword { .. }
            | Step::RemoveFolder { .. }
            | Step::ReleaseImage { .. }
            | Step::DropSavedDefinition
            | Step::SetGuestTime
            | Step::DumpMemory { .. }
            | Step::KnowDefinition { .. } => Ok(false),
        }
    }

    async fn ready(&self) {
        let mut link = self.hypervisor.link();
        if link
            .wait_for(|state| *state == LinkState::Up)
            .await
            .is_err()
        {
            // Nobody will ever say that it is back.
            std::future::pending::<()>().await;
        }
    }

    async fn settled(&self, server: Uuid) {
        let hangs = || {
            let mut stuck = self.hypervisor.stuck_calls().into_iter();
            stuck.any(|call| call.domain == Some(server) && call.changes_domain())
        };
        // Nobody tells when such a call comes back.
        while hangs() {
            tokio::time::sleep(STUCK_PAUSE).await;
        }
        self.files.at_rest(server).await;
    }
}

/// What a step reports, if it has something to say.
type Applied = Result<Option<StepReport>, StepError>;

impl From<HypervisorError> for StepError {
    fn from(error: HypervisorError) -> Self {
        let link_down = matches!(error, HypervisorError::LinkDown { .. });
        let refusal = Refusal::from(error);
        Self {
            link_down,
            ..Self::new(refusal.reason, refusal.message)
        }
    }
}

impl From<StoreError> for StepError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Refused(refusal) => Self::new(refusal.reason, refusal.message),
            StoreError::Missing { what: "image", id } => Self::new(
                Reason::ImageNotFound,
                format!("image {id} was removed meanwhile"),
            ),
            error => {
                tracing::error!(error = &error as &dyn std::error::Error, "the store failed");
                Self::new(
                    Reason::Internal,
                    "the agent's store failed; its log has the details",
                )
            }
        }
    }
}

const fn boot(fresh: bool) -> Boot {
    if fresh { Boot::Fresh } else { Boot::Resume }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{path::Path, sync::mpsc};

    use super::*;
    use crate::{
        cancel::Cancel,
        core::{
            action::Verb,
            plan::{Outcome, Plan},
        },
        hypervisor::fake::FakeHypervisor,
    };

    #[tokio::test]
    async fn a_removal_that_was_given_up_on_does_not_meet_what_the_next_operation_makes() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path().to_str().unwrap());
        let store = Store::open(&folder.path().join("db"), 10).unwrap();
        let fake = Arc::new(FakeHypervisor::new());
        let steps = Steps::new(fake, store, QemuImg::default(), layout.clone());
        let server = Uuid::from_u128(1);
        let path = layout.server(server);
        std::fs::create_dir_all(&path).unwrap();

        // A removal whose deadline is over and whose thread hangs in the disk.
        let (release, held) = mpsc::channel::<()>();
        let (began, beginning) = tokio::sync::oneshot::channel();
        let remove = Step::RemoveFolder { path: path.clone() };
        let removal = steps.files.run(FileJob::apply(server, &remove), {
            let (path, top) = (path.clone(), layout.servers());
            move || {
                began.send(()).unwrap();
                held.recv().unwrap();
                files::remove_tree(Path::new(&path), Path::new(&top))
            }
        });
        tokio::select! {
            _ = removal => unreachable!(),
            begun = beginning => begun.unwrap(),
        }

        let plan = Plan {
            id: Uuid::from_u128(2),
            server,
            verb: Verb::Create,
            initial: None,
            steps: Vec::new(),
            outcome: Outcome::Remove,
            warnings: Vec::new(),
            password_delivery: Vec::new(),
        };
        let context = StepContext {
            plan: &plan,
            cancel: Cancel::never(),
            server_goes: Cancel::never(),
            progress: &|_| {},
        };
        let make = Step::MakeFolder { path: path.clone() };
        let make = steps.apply(context, &make);
        let back = async {
            tokio::task::yield_now().await;
            let settled = tokio::time::timeout(Duration::from_millis(20), steps.settled(server));
            assert!(settled.await.is_err(), "the removal is not back");
            release.send(()).unwrap();
            steps.settled(server).await;
        };
        let (made, ()) = tokio::join!(make, back);
        made.unwrap();
        assert!(Path::new(&path).is_dir());
    }
}
