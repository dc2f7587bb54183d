// SPDX-License-Identifier: Apache-2.0
//! The image service of a real agent: what comes in, what does not, and how images are found.

use std::fs;
use std::path::{Path, PathBuf};

use salvor_proto::v1::{
    DeleteImageRequest, GetImageRequest, Image, ImageFormat, ImageSpec, ImportImageFromPathRequest,
    ListImagesRequest,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::assert_refused;
use salvor_tests::guests::{Format, TinyGuest, run};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::scene::{Scene, sha256};

/// Imports a file of the host by its path.
async fn by_path(scene: &mut Scene<'_>, path: &str, spec: ImageSpec) -> Result<Image, Status> {
    let request = ImportImageFromPathRequest {
        spec: Some(spec),
        path: path.into(),
    };
    let answer = scene.client.images.import_image_from_path(request).await?;
    let mut stream = answer.into_inner();
    let mut copied = 0;
    while let Some(message) = stream.message().await? {
        assert!(message.copied_bytes >= copied, "progress goes forward");
        copied = message.copied_bytes;
        if let Some(image) = message.image {
            assert_eq!(copied, message.total_bytes);
            return Ok(image);
        }
    }
    panic!("the stream ended without an image or an error");
}

fn spec(name: &str) -> ImageSpec {
    ImageSpec {
        name: name.into(),
        ..ImageSpec::default()
    }
}

async fn listed(scene: &mut Scene<'_>) -> Vec<Image> {
    let request = ListImagesRequest::default();
    let answer = scene.client.images.list_images(request).await.unwrap();
    answer.into_inner().images
}

fn stored(scene: &Scene<'_>) -> Vec<PathBuf> {
    let folder = fs::read_dir(scene.agent.state_folder().join("images"));
    folder
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect()
}

/// A file that `qemu-img create` makes.
fn created(folder: &Path, name: &str, words: &[&str]) -> PathBuf {
    let file = folder.join(name);
    let file_name = file.to_str().unwrap();
    let (options, size) = words.split_at(words.len() - 1);
    let all = ["create", "-q"].iter().chain(options).copied();
    run("qemu-img", all.chain([file_name, size[0]]));
    file
}

// gap 15
#[tokio::test(flavor = "multi_thread")]
async fn unsafe_and_misdeclared_images_are_refused_with_a_reason_and_leave_nothing() {
    let import = salvor_tests::run_folder::RunFolder::named("unsafe-images");
    let folder = import.path();
    let allowed = vec![toml::Value::from(folder.to_str().unwrap())];
    let mut scene = Scene::with(AgentSettings::default().set("import_dirs", allowed)).await;
    let secret = folder.join("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let secret_name = secret.to_str().unwrap();
    let data_file = format!("data_file={secret_name}");
    let good = created(folder, "good", &["-f", "qcow2", "1M"]);
    let cut = folder.join("cut");
    fs::write(&cut, &fs::read(&good).unwrap()[..60]).unwrap();
    let empty = folder.join("empty");
    fs::write(&empty, "").unwrap();
    let huge = folder.join("huge");
    fs::File::create(&huge).unwrap().set_len(8 << 40).unwrap();
    let locked = folder.join("locked");
    let mut header = fs::read(&good).unwrap();
    // Offset 32: how it is encrypted, 2 being LUKS. qemu-img would time the key's derivation first, which
    // it cannot on every machine.
    header[32..36].copy_from_slice(&2u32.to_be_bytes());
    fs::write(&locked, header).unwrap();

    let qcow2 = ImageFormat::Qcow2;
    let told = ImageFormat::Unspecified;
    let cases = [
        (
            created(
                folder,
                "backed",
                &["-f", "qcow2", "-F", "raw", "-b", secret_name, "1M"],
            ),
            qcow2,
            "IMAGE_UNSAFE",
        ),
        (
            created(folder, "external", &["-f", "qcow2", "-o", &data_file, "1M"]),
            qcow2,
            "IMAGE_UNSAFE",
        ),
        (locked, qcow2, "IMAGE_UNSAFE"),
        (
            created(folder, "vmdk", &["-f", "vmdk", "1M"]),
            told,
            "IMAGE_UNSAFE",
        ),
        (
            created(folder, "vdi", &["-f", "vdi", "1M"]),
            told,
            "IMAGE_UNSAFE",
        ),
        (
            created(folder, "vast", &["-f", "qcow2", "1T"]),
            qcow2,
            "IMAGE_TOO_LARGE",
        ),
        (cut, qcow2, "IMAGE_UNSAFE"),
        (empty, told, "IMAGE_UNSAFE"),
        (good, ImageFormat::Iso, "IMAGE_UNSAFE"),
        (secret.clone(), qcow2, "IMAGE_UNSAFE"),
        (huge, ImageFormat::Raw, "IMAGE_TOO_LARGE"),
    ];
    for (file, format, reason) in cases {
        println!("{}", file.display());
        let declared = ImageSpec {
            format: format.into(),
            ..spec("bad")
        };
        let answer = by_path(&mut scene, file.to_str().unwrap(), declared).await;
        let answer = answer.map(tonic::Response::new);
        assert_refused(answer, Code::InvalidArgument, reason);
        if fs::metadata(&file).unwrap().len() < 4 << 20 {
            let sent = scene
                .client
                .try_import("bad", format, fs::read(&file).unwrap());
            assert_refused(sent.await, Code::InvalidArgument, reason);
        }
        assert_eq!(listed(&mut scene).await, []);
        assert_eq!(stored(&scene), Vec::<PathBuf>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_regular_files_of_configured_folders_are_imported_by_path() {
    let import = salvor_tests::run_folder::RunFolder::named("import-folder");
    let outside = salvor_tests::run_folder::RunFolder::named("not-the-import-folder");
    let allowed = vec![toml::Value::from(import.path().to_str().unwrap())];
    let mut scene = Scene::with(AgentSettings::default().set("import_dirs", allowed)).await;
    let good = import.join("good.qcow2");
    TinyGuest::new("good").build(&good, Format::Qcow2);
    let elsewhere = outside.join("good.qcow2");
    fs::copy(&good, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, import.join("link")).unwrap();
    std::os::unix::fs::symlink(outside.path(), import.join("folder")).unwrap();
    run("mkfifo", [import.join("pipe")]);

    let (inside, folder) = (import.path().display(), outside.path().display());
    for path in [
        format!("{folder}/good.qcow2"),
        format!("{inside}/link"),
        format!("{inside}/folder/good.qcow2"),
        format!("{inside}/../not-the-import-folder/good.qcow2"),
        format!("{inside}/pipe"),
        format!("{inside}/missing"),
        format!("{inside}"),
        "good.qcow2".into(),
        "/dev/zero".into(),
        "/etc/shadow".into(),
        String::new(),
        format!("{inside}/good.qcow2\0"),
    ] {
        println!("{path:?}");
        let answer = by_path(&mut scene, &path, spec("bad")).await;
        let answer = answer.map(tonic::Response::new);
        assert_refused(answer, Code::InvalidArgument, "INVALID_FIELD");
    }
    assert_eq!(listed(&mut scene).await, []);

    let image = by_path(&mut scene, good.to_str().unwrap(), spec("good"))
        .await
        .unwrap();
    assert_eq!(image.format(), ImageFormat::Qcow2);
    assert_eq!(image.sha256, sha256(&good));
    assert_eq!(image.virtual_size_bytes, 8 << 20);
    assert_eq!(stored(&scene).len(), 1);
    assert_eq!(sha256(&stored(&scene)[0]), image.sha256);
    assert!(good.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_can_be_repeated_is_checked_and_is_found_by_what_is_unique() {
    let mut scene = Scene::new().await;
    let file = scene.disk("one");
    TinyGuest::new("one").build(&file, Format::Qcow2);
    let bytes = fs::read(&file).unwrap();
    let other = scene.disk("two");
    TinyGuest::new("two").build(&other, Format::Qcow2);
    let id = Uuid::new_v4().to_string();
    let wanted = ImageSpec {
        id: id.clone(),
        sha256: sha256(&file),
        ..spec("one")
    };
    let first = scene.client.send_image(wanted.clone(), bytes.clone()).await;
    let first = first.unwrap().into_inner().image.unwrap();
    let again = scene.client.send_image(wanted.clone(), bytes.clone()).await;
    assert_eq!(again.unwrap().into_inner().image.unwrap(), first);
    let wrong = ImageSpec {
        id: String::new(),
        sha256: sha256(&other),
        ..spec("wrong")
    };
    let answer = scene.client.send_image(wrong, bytes.clone()).await;
    assert_refused(answer, Code::InvalidArgument, "IMAGE_CHECKSUM");
    let taken = ImageSpec {
        sha256: String::new(),
        ..wanted
    };
    let answer = scene
        .client
        .send_image(taken, fs::read(&other).unwrap())
        .await;
    assert_refused(answer, Code::AlreadyExists, "IMAGE_EXISTS");
    assert_eq!(listed(&mut scene).await, std::slice::from_ref(&first));

    let two = scene.import("two", Format::Qcow2, &other).await;
    let twin = scene.import("two", Format::Qcow2, &other).await;
    let find = |image: &str| GetImageRequest {
        image: image.into(),
    };
    for word in [first.id.as_str(), &first.id[..8], "one"] {
        let found = scene.client.images.get_image(find(word)).await.unwrap();
        assert_eq!(found.into_inner().image.unwrap().id, first.id);
    }
    let answer = scene.client.images.get_image(find("two")).await;
    assert_refused(answer, Code::InvalidArgument, "AMBIGUOUS_NAME");
    let answer = scene.client.images.get_image(find("three")).await;
    assert_refused(answer, Code::NotFound, "IMAGE_NOT_FOUND");

    let mut seen = Vec::new();
    let mut request = ListImagesRequest {
        page_size: 1,
        ..ListImagesRequest::default()
    };
    loop {
        let page = scene
            .client
            .images
            .list_images(request.clone())
            .await
            .unwrap();
        let page = page.into_inner();
        assert!(page.images.len() <= 1);
        seen.extend(page.images.into_iter().map(|image| image.id));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let mut expected = [two.id.clone(), twin.id.clone()];
    expected.sort();
    assert_eq!(seen, [&[first.id.clone()][..], &expected[..]].concat());

    for image in [first.id, two.id, twin.id] {
        let request = DeleteImageRequest {
            image: image.clone(),
        };
        scene
            .client
            .images
            .delete_image(request.clone())
            .await
            .unwrap();
        let answer = scene.client.images.delete_image(request).await;
        assert_refused(answer, Code::NotFound, "IMAGE_NOT_FOUND");
    }
    assert_eq!(stored(&scene), Vec::<PathBuf>::new());
}
