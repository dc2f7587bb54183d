// SPDX-License-Identifier: Apache-2.0
//! What each step does on the host. One file per family.
//!
//! Every function here is idempotent: a step may be applied after it was applied in part by an agent
//! that died, and taken back although it never began.

mod disks;
mod domain;
mod files;
mod records;
mod sweep;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use uuid::Uuid;

use disks::Base;
pub use sweep::sweep;

use crate::{
    core::{
        layout::Layout,
        plan::{PlannedStep, Step},
        reason::{Reason, Refusal},
    },
    engine::{StepContext, StepError, StepReport, StepRunner},
    hypervisor::{Boot, Hypervisor, HypervisorError, LinkState},
    storage::qemu_img::QemuImg,
    store::{Store, StoreError},
};

/// How often it is looked whether a call that was given up on has come back.
const STUCK_PAUSE: Duration = Duration::from_millis(100);

/// The host that steps work on.
pub struct Steps {
    hypervisor: Arc<dyn Hypervisor>,
    store: Store,
    qemu_img: QemuImg,
    layout: Layout,
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
            hypervisor,
            store,
            qemu_img,
            layout,
        }
    }
}

#[async_trait]
impl StepRunner for Steps {
    async fn apply(&self, context: StepContext<'_>, step: &Step) -> Result<StepReport, StepError> {
        let (server, plan) = (context.plan.server, context.plan.id);
        match step {
            Step::HoldImage {
                image,
                path,
                size,
                holder,
            } => self.hold_image(server, *image, (path, *size), holder).await,
            Step::MakeFolder { path } => self.make_folder(server, path).await,
            Step::CreateOverlay {
                path,
                backing,
                backing_format,
                backing_references,
                size,
            } => {
                let base = Base::new(backing, backing_format, backing_references)?;
                self.create_overlay(server, path, base, *size).await
            }
            Step::CopyFile { from, to } => self.copy_file(&context, from, to).await,
            Step::BuildConfigDrive { path, drive } => {
                self.build_config_drive(server, path, drive).await
            }
            Step::SaveDefinition { xml } => self.save_definition(server, plan, xml).await,
            Step::PowerOff { shutdown, .. } => self.power_off(&context, *shutdown).await,
            Step::MarkCommitStarted => self.mark_commit_started(server).await,
            Step::CommitOverlay {
                path,
                base,
                base_format,
                base_references,
            } => {
                let base = Base::new(base, base_format, base_references)?;
                self.commit_overlay(&context, path, base).await
            }
            Step::DefineDomain { xml, mark, before } => {
                self.define(server, xml, *mark, before.as_deref()).await
            }
            Step::UndefineDomain { .. } => self.undefine(server).await,
            Step::StartDomain { mark, fresh } => self.start(server, *mark, boot(*fresh)).await,
            Step::DropSavedMemory => self.drop_saved_memory(server).await,
            Step::SetUserPassword { user, hash } => {
                self.set_user_password(server, user, hash).await
            }
            Step::RemoveFolder { path } => self.remove_folder(server, path).await,
            Step::ReleaseImage { image, holder } => self.release_image(*image, holder).await,
            Step::DropSavedDefinition => self.drop_saved_definition(server).await,
        }
        .map(|report| report.unwrap_or_default())
    }

    async fn revert(&self, context: StepContext<'_>, step: &Step) -> Result<(), StepError> {
        let (server, plan) = (context.plan.server, context.plan.id);
        match step {
            Step::HoldImage { image, holder, .. } => {
                self.release_image(*image, holder).await.map(|_| ())
            }
            Step::MakeFolder { path } => self.remove_folder(server, path).await.map(|_| ()),
            Step::CreateOverlay { path, .. }
            | Step::CopyFile { to: path, .. }
            | Step::BuildConfigDrive { path, .. } => self.remove_file(server, path).await,
            Step::SaveDefinition { .. } => self.drop_definition_of(server, plan).await,
            Step::PowerOff { was_on: false, .. } => Ok(()),
            Step::PowerOff {
                was_on: true,
                shutdown,
            } => {
                // A plan that defines may have left memory behind that was saved of the other
                // definition; any other has no reason to lose what was saved.
                let defines = |step: &PlannedStep| matches!(step.step, Step::DefineDomain { .. });
                let boot = boot(context.plan.steps.iter().any(defines));
                self.power_on_again(server, *shutdown, boot).await
            }
            // The overlays show the same disk as before, however much of them was written.
            Step::MarkCommitStarted | Step::CommitOverlay { .. } => Ok(()),
            Step::DefineDomain { xml, mark, before } => {
                self.define_again(server, xml, *mark, before.as_deref())
                    .await
            }
            Step::UndefineDomain { before } => self.define_removed(server, before).await,
            Step::StartDomain { mark, .. } => self.stop_started(server, *mark).await,
            // Where there was some, the guest boots again instead of going on.
            Step::DropSavedMemory => Ok(()),
            // The password before is not known, and a rescue guest that takes another one is no worse.
            Step::SetUserPassword { .. } => Ok(()),
            // Clean-up is never taken back.
            Step::RemoveFolder { .. } | Step::ReleaseImage { .. } | Step::DropSavedDefinition => {
                Ok(())
            }
        }
    }

    async fn observe(&self, context: StepContext<'_>, step: &Step) -> Result<bool, StepError> {
        let server = context.plan.server;
        match step {
            Step::PowerOff { .. } => self.is_off(server).await,
            Step::DefineDomain { xml, mark, .. } => self.is_defined(server, xml, *mark).await,
            Step::UndefineDomain { .. } => self.is_undefined(server).await,
            Step::StartDomain { mark, .. } => self.is_started(server, *mark).await,
            // Cheap to do again, and what is half there cannot be told from what is whole.
            Step::HoldImage { .. }
            | Step::MakeFolder { .. }
            | Step::CreateOverlay { .. }
            | Step::CopyFile { .. }
            | Step::BuildConfigDrive { .. }
            | Step::SaveDefinition { .. }
            | Step::MarkCommitStarted
            | Step::CommitOverlay { .. }
            | Step::DropSavedMemory
            | Step::SetUserPassword { .. }
            | Step::RemoveFolder { .. }
            | Step::ReleaseImage { .. }
            | Step::DropSavedDefinition => Ok(false),
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
