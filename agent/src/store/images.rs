// SPDX-License-Identifier: Apache-2.0
//! Records of images, who stands on them, and which calls made and removed them.

use rusqlite::{Connection, OptionalExtension as _, params};
use uuid::Uuid;

use super::{
    Durability, Request, Store, StoreError, StoreResult,
    documents::{self, column, two_texts},
    journal::reused,
};
use crate::core::{
    image::{FileIdentity, ImageRecord},
    reason::{Reason, Refusal},
};

/// What a call on an image was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageAnswer {
    /// It imported this image.
    Imported(Box<ImageRecord>),
    /// It deleted an image.
    Deleted,
}

/// The hash of what the call with this request id asked for, and the image that it imported.
pub(super) fn answered(
    connection: &Connection,
    id: &str,
) -> StoreResult<Option<(String, Option<String>)>> {
    Ok(connection
        .prepare_cached("SELECT body_hash, doc FROM image_requests WHERE request_id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?)
}

fn repeated(connection: &Connection, request: &Request) -> StoreResult<Option<ImageAnswer>> {
    let Some(id) = &request.id else {
        return Ok(None);
    };
    let Some((body_hash, doc)) = answered(connection, id)? else {
        let operation: bool = connection.query_row(
            "SELECT EXISTS (SELECT 1 FROM operations WHERE request_id = ?1)",
            [id],
            |row| row.get(0),
        )?;
        return if operation { Err(reused(id)) } else { Ok(None) };
    };
    if body_hash != request.body_hash {
        return Err(reused(id));
    }
    Ok(Some(match doc {
        Some(doc) => ImageAnswer::Imported(Box::new(documents::IMAGE_REQUEST.read(id, &doc)?)),
        None => ImageAnswer::Deleted,
    }))
}

/// Notes what a call is answered, if it can be repeated.
fn note(
    tx: &Connection,
    request: &Request,
    imported: Option<&ImageRecord>,
    now_ms: i64,
) -> StoreResult<()> {
    if let Some(id) = &request.id {
        let doc = imported.map(documents::write).transpose()?;
        tx.execute(
            "INSERT INTO image_requests (request_id, body_hash, created_at, doc) VALUES (?1, ?2, ?3, ?4)",
            params![id, request.body_hash, now_ms, doc],
        )?;
    }
    Ok(())
}

/// Forgets calls that are older than `before_ms`.
pub(super) fn forget_calls(tx: &Connection, before_ms: i64) -> StoreResult<()> {
    tx.execute(
        "DELETE FROM image_requests WHERE created_at < ?1",
        [before_ms],
    )?;
    Ok(())
}

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

    /// What a call on an image with this request id was answered, if there was one.
    ///
    /// # Errors
    /// [`Reason::RequestIdReused`] if the call asked for something else.
    pub async fn repeated_on_image(&self, request: Request) -> StoreResult<Option<ImageAnswer>> {
        self.run(move |db| repeated(&db.connection, &request)).await
    }

    /// Notes that a call imported an image that was there already.
    ///
    /// # Errors
    /// [`Reason::RequestIdReused`].
    pub async fn imported_again(
        &self,
        image: ImageRecord,
        request: Request,
        now_ms: i64,
    ) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, _| match repeated(tx, &request)? {
                Some(_) => Ok(()),
                None => note(tx, &request, Some(&image), now_ms),
            })
        })
        .await
    }

    /// Adds an image, for this call.
    ///
    /// # Errors
    /// [`Reason::ImageExists`] if there is one with this id; [`Reason::RequestIdReused`].
    pub async fn add_image(&self, image: ImageRecord, request: Request) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, _| {
                if let (Some(id), Some(_)) = (&request.id, repeated(tx, &request)?) {
                    return Err(reused(id));
                }
                note(tx, &request, Some(&image), image.created_at_ms)?;
                let added = tx.execute(
                    "INSERT OR IGNORE INTO images (id, name, doc) VALUES (?1, ?2, ?3)",
                    params![image.id.to_string(), image.name, documents::write(&image)?],
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
                "SELECT id, doc, (SELECT count(*) FROM image_holders WHERE image = images.id) FROM images ORDER BY name, id",
            )?;
            let rows = statement.query_map([], |row| Ok((two_texts(row)?, row.get::<_, u32>(2)?)))?;
            let mut images = Vec::new();
            for row in rows {
                let ((id, doc), holders) = row?;
                images.push((documents::IMAGE.read(&id, &doc)?, holders));
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
            doc.map(|doc| documents::IMAGE.read(&id, &doc)).transpose()
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
                let mut image: ImageRecord = documents::IMAGE.read(&id, &doc)?;
                image.file = Some(file);
                tx.execute(
                    "UPDATE images SET doc = ?2 WHERE id = ?1",
                    params![id.to_string(), documents::write(&image)?],
                )?;
                Ok(())
            })
        })
        .await
    }

    /// Removes an image that nobody stands on, for this call; if it did so before, that is success.
    /// Its file may go only after this; until that is said ([`Store::forget_image_file`]) it is noted.
    ///
    /// # Errors
    /// [`Reason::ImageInUse`] with the holders' names; [`Reason::ImageNotFound`];
    /// [`Reason::RequestIdReused`].
    pub async fn remove_image(&self, id: Uuid, request: Request, now_ms: i64) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, _| {
                if repeated(tx, &request)?.is_some() {
                    return Ok(());
                }
                note(tx, &request, None, now_ms)?;
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
            let rows = statement.query_map([], two_texts)?;
            let mut holders = Vec::new();
            for row in rows {
                let (image, holder) = row?;
                holders.push((
                    column("image_holders", "image").id(&holder, &image)?,
                    holder,
                ));
            }
            Ok(holders)
        })
        .await
    }
}
