// SPDX-License-Identifier: Apache-2.0
//! Steps that only the store sees: images held, definitions saved.

use std::path::PathBuf;

use uuid::Uuid;

use super::{Applied, Steps, work::FileJob};
use crate::{
    core::reason::Reason,
    engine::{StepError, now_ms},
};

impl Steps {
    pub(super) async fn hold_image(
        &self,
        job: FileJob,
        image: Uuid,
        (path, size): (&str, u64),
        holder: &str,
    ) -> Applied {
        self.store.hold_image(image, holder.to_owned()).await?;
        // Looked at after it is held: from here on nobody can remove it.
        let file = PathBuf::from(path);
        match self.files.run(job, move || Ok(file.metadata())).await? {
            Ok(metadata) if metadata.is_file() && metadata.len() == size => Ok(None),
            Ok(metadata) => Err(StepError::new(
                Reason::ImageNotFound,
                format!(
                    "the file {path} of image {image} has {} bytes instead of {size}; import the image again",
                    metadata.len()
                ),
            )),
            Err(error) => Err(StepError::new(
                Reason::ImageNotFound,
                format!(
                    "the file {path} of image {image} cannot be read ({error}); import the image again"
                ),
            )),
        }
    }

    pub(super) async fn release_image(&self, image: Uuid, holder: &str) -> Applied {
        self.store.release_image(image, holder.to_owned()).await?;
        Ok(None)
    }

    pub(super) async fn save_definition(&self, server: Uuid, plan: Uuid, xml: &str) -> Applied {
        self.store
            .save_definition(server, plan, xml.to_owned())
            .await?;
        Ok(None)
    }

    pub(super) async fn drop_definition_of(
        &self,
        server: Uuid,
        plan: Uuid,
    ) -> Result<(), StepError> {
        Ok(self.store.drop_definition(server, Some(plan)).await?)
    }

    pub(super) async fn drop_saved_definition(&self, server: Uuid) -> Applied {
        self.store.drop_definition(server, None).await?;
        Ok(None)
    }

    pub(super) async fn mark_commit_started(&self, server: Uuid) -> Applied {
        self.store.mark_commit_started(server, now_ms()).await?;
        Ok(None)
    }
}
