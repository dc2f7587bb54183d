// SPDX-License-Identifier: Apache-2.0
//! Records of images, and who stands on them.

use rusqlite::{Connection, OptionalExtension as _, params};
use uuid::Uuid;

use super::{Durability, Store, StoreError, StoreResult};
use crate::core::{
    image::{FileIdentity, ImageRecord},
    reason::{Reason, Refusal},
};

/// Notes that a file without a record may be there.
fn note_file(tx: &Connection, id: Uuid) -> StoreResult<()> {
    tx.execute(
        "INSERT OR IGNORE INTO image_files (image) VALUES (?1)",
        [id.to_string()],
    )?;
    Ok(())
}

fn forget_file(tx: &Connection, id: Uuid) -> StoreResult<()> {
    tx.execute("DELETE FROM image_files WHERE image = ?1", [id.to_string()])?;
    Ok(())
}

/// The file of an image comes before its record and goes after it. In between a note says that it may
/// be there, and that it is nobody's: of a file that neither a record nor a note knows the agent
/// cannot tell that, for the store may have been lost.
impl Store {
    /// Notes, for good, that the file of an image is about to be made.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn note_image_file(&self, id: Uuid) -> StoreResult<()> {
        self.run(move |db| db.change(Durability::Power, |tx, _| note_file(tx, id)))
            .await
    }

    /// Forgets the note: there is no such file.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn forget_image_file(&self, id: Uuid) -> StoreResult<()> {
        self.run(move |db| db.change(Durability::Process, |tx, _| forget_file(tx, id)))
            .await
    }

    /// The images whose files may be there although they have no record.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn image_files_without_record(&self) -> StoreResult<Vec<Uuid>> {
        self.run(|db| {
            let mut statement = db
                .connection
                .prepare_cached("SELECT image FROM image_files ORDER BY image")?;
            let ids = statement.query_map([], |row| row.get::<_, String>(0))?;
            let mut files = Vec::new();
            for id in ids {
                files.extend(Uuid::parse_str(&id?));
            }
            Ok(files)
        })
        .await
    }

    /// Adds an image, whose file is in place.
    ///
    /// # Errors
    /// [`Reason::ImageExists`] if there is one with this id.
    pub async fn add_image(&self, image: ImageRecord) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, _| {
                let added = tx.execute(
                    "INSERT OR IGNORE INTO images (id, name, doc) VALUES (?1, ?2, ?3)",
                    params![
                        image.id.to_string(),
                        image.name,
                        serde_json::to_string(&image)?
                    ],
                )?;
                if added == 0 {
                    return Err(Refusal::new(
                        Reason::ImageExists,
                        format!("an image {} exists already", image.id),
                    )
                    .into());
                }
                forget_file(tx, image.id)
            })
        })
        .await
    }

    /// Every image with the number of its holders, by name and id.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn images(&self) -> StoreResult<Vec<(ImageRecord, u32)>> {
        self.run(|db| {
            let mut statement = db.connection.prepare_cached(
                "SELECT doc, (SELECT count(*) FROM image_holders WHERE image = images.id) FROM images ORDER BY name, id",
            )?;
            let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?)))?;
            let mut images = Vec::new();
            for row in rows {
                let (doc, holders) = row?;
                images.push((serde_json::from_str(&doc)?, holders));
            }
            Ok(images)
        })
        .await
    }

    /// One image.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn image(&self, id: Uuid) -> StoreResult<Option<ImageRecord>> {
        self.run(move |db| {
            let doc: Option<String> = db
                .connection
                .query_row(
                    "SELECT doc FROM images WHERE id = ?1",
                    [id.to_string()],
                    |row| row.get(0),
                )
                .optional()?;
            Ok(doc.map(|doc| serde_json::from_str(&doc)).transpose()?)
        })
        .await
    }

    /// Notes which file has the content of an image. A power cut may undo that: then it is found out
    /// once more.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the image is gone.
    pub async fn note_image_identity(&self, id: Uuid, file: FileIdentity) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                let doc: Option<String> = tx
                    .query_row(
                        "SELECT doc FROM images WHERE id = ?1",
                        [id.to_string()],
                        |row| row.get(0),
                    )
                    .optional()?;
                let Some(doc) = doc else {
                    return Err(StoreError::Missing {
                        what: "image",
                        id: id.to_string(),
                    });
                };
                let mut image: ImageRecord = serde_json::from_str(&doc)?;
                image.file = Some(file);
                tx.execute(
                    "UPDATE images SET doc = ?2 WHERE id = ?1",
                    params![id.to_string(), serde_json::to_string(&image)?],
                )?;
                Ok(())
            })
        })
        .await
    }

    /// Removes an image that nobody stands on. Its file may go only after this; until that is said
    /// ([`Store::forget_image_file`]) it is noted.
    ///
    /// # Errors
    /// [`Reason::ImageInUse`] with the holders' names; [`Reason::ImageNotFound`].
    pub async fn remove_image(&self, id: Uuid) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, _| {
                let mut statement =
                    tx.prepare_cached("SELECT holder FROM image_holders WHERE image = ?1 LIMIT 5")?;
                let holders = statement
                    .query_map([id.to_string()], |row| row.get::<_, String>(0))?
                    .collect::<Result<Vec<_>, _>>()?;
                if !holders.is_empty() {
                    return Err(Refusal::new(
                        Reason::ImageInUse,
                        format!("image {id} is in use by {}", holders.join(", ")),
                    )
                    .into());
                }
                if tx.execute("DELETE FROM images WHERE id = ?1", [id.to_string()])? == 0 {
                    return Err(Refusal::new(
                        Reason::ImageNotFound,
                        format!("there is no image {id}"),
                    )
                    .into());
                }
                note_file(tx, id)
            })
        })
        .await
    }

    /// Notes that `holder` stands on an image. Noting it twice is noting it once. A later step of the
    /// same plan makes it survive a power cut, or the step is applied again.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the image is gone.
    pub async fn hold_image(&self, id: Uuid, holder: String) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                let exists: bool = tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM images WHERE id = ?1)",
                    [id.to_string()],
                    |row| row.get(0),
                )?;
                if !exists {
                    return Err(StoreError::Missing {
                        what: "image",
                        id: id.to_string(),
                    });
                }
                tx.execute(
                    "INSERT OR IGNORE INTO image_holders (image, holder) VALUES (?1, ?2)",
                    params![id.to_string(), holder],
                )?;
                Ok(())
            })
        })
        .await
    }

    /// Notes that `holder` no longer stands on an image.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn release_image(&self, id: Uuid, holder: String) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                tx.execute(
                    "DELETE FROM image_holders WHERE image = ?1 AND holder = ?2",
                    params![id.to_string(), holder],
                )?;
                Ok(())
            })
        })
        .await
    }

    /// Who stands on which image.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn image_holders(&self) -> StoreResult<Vec<(Uuid, String)>> {
        self.run(|db| {
            let mut statement = db
                .connection
                .prepare_cached("SELECT image, holder FROM image_holders ORDER BY image, holder")?;
            let rows = statement.query_map([], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
            })?;
            let mut holders = Vec::new();
            for row in rows {
                let (image, holder) = row?;
                holders.push((Uuid::parse_str(&image).unwrap_or_default(), holder));
            }
            Ok(holders)
        })
        .await
    }
}
