// SPDX-License-Identifier: Apache-2.0
//! The image service of a real agent: what comes in, what does not, and how images are found.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use salvor_proto::v1::{
    DeleteImageRequest, DiskProtection, GetImageRequest, Image, ImageFormat, ImageSpec,
    ImportImageFromPathRequest, ListImagesRequest, OverlayDisposition,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::assert_refused;
use salvor_tests::guests::{Format, TinyGuest, run};
use salvor_tests::tool;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::actor::tiny;
use crate::scene::{Scene, sha256};

/// Imports a file of the host by its path.
async fn by_path(scene: &mut Scene<'_>, path: &str, spec: ImageSpec) -> Result<Image, Status> {
    let request = ImportImageFromPathRequest {
        spec: Some(spec),
        path: path.into(),
        ..ImportImageFromPathRequest::default()
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

/// A change of a file's bytes at an offset.
fn with(folder: &Path, name: &str, original: &Path, at: usize, bytes: &[u8]) -> PathBuf {
    let mut image = fs::read(original).unwrap();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    let file = folder.join(name);
    fs::write(&file, image).unwrap();
    file
}

/// An ISO that holds a file.
fn iso_of(folder: &Path, name: &str, content: &Path) -> PathBuf {
    let (tree, file) = (folder.join(format!("{name}.tree")), folder.join(name));
    fs::create_dir(&tree).unwrap();
    fs::copy(content, tree.join("disk.qcow2")).unwrap();
    tool!("genisoimage", "-quiet", "-J", "-R", "-o", file, tree);
    file
}

/// QEMU's tools, each of which notes that it was run before it does what it was told.
struct Recorder {
    folder: PathBuf,
}

impl Recorder {
    fn new(folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        let recorder = Self {
            folder: folder.to_owned(),
        };
        for tool in ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"] {
            let script = folder.join(tool);
            let (log, real) = (recorder.log(), format!("/usr/bin/{tool}"));
            let text = format!(
                "#!/bin/sh\necho \"{tool} $*\" >> '{}'\nexec {real} \"$@\"\n",
                log.display()
            );
            fs::write(&script, text).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        }
        recorder
    }

    fn log(&self) -> PathBuf {
        self.folder.join("runs")
    }

    /// The agent's way to them.
    fn settings(&self, settings: AgentSettings) -> AgentSettings {
        let path = std::env::var("PATH").unwrap();
        settings.env("PATH", &format!("{}:{path}", self.folder.display()))
    }

    fn runs(&self) -> Vec<String> {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}

/// Every kind of image that must not come in: its file, what it is declared to be, the reason against it.
fn corpus(folder: &Path) -> Vec<(PathBuf, ImageFormat, &'static str)> {
    let (qcow2, raw, told) = (
        ImageFormat::Qcow2,
        ImageFormat::Raw,
        ImageFormat::Unspecified,
    );
    let (bad, large) = ("IMAGE_UNSAFE", "IMAGE_TOO_LARGE");
    let secret = folder.join("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let secret_name = secret.to_str().unwrap();
    let data_file = format!("data_file={secret_name}");
    let backed = ["-f", "qcow2", "-F", "raw", "-b", secret_name, "1M"];
    let backed = created(folder, "backed", &backed);
    let good = created(folder, "good", &["-f", "qcow2", "1M"]);
    let filled = folder.join("filled");
    tool!("qemu-img", "convert", "-O", "qcow2", secret, filled);
    let sized = |name: &str, from: &Path, size: u64| {
        let file = folder.join(name);
        if from.exists() {
            fs::copy(from, &file).unwrap();
        }
        let options = fs::File::options().create(true).append(true).open(&file);
        options.unwrap().set_len(size).unwrap();
        file
    };
    let nothing = folder.join("nothing");
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"monolithicFlat\"\n\nRW 2048 FLAT \"{secret_name}\" 0\n"
    );
    let extents = folder.join("extents.vmdk");
    fs::write(&extents, descriptor).unwrap();
    let iso = iso_of(folder, "disguised.iso", &backed);
    let header = &fs::read(&good).unwrap()[..104];

    vec![
        // Content of other files.
        (backed.clone(), qcow2, bad),
        (backed, raw, bad),
        (
            created(folder, "external", &["-f", "qcow2", "-o", &data_file, "1M"]),
            qcow2,
            bad,
        ),
        (extents.clone(), told, bad),
        (extents, raw, bad),
        (
            created(folder, "sparse.vmdk", &["-f", "vmdk", "1M"]),
            told,
            bad,
        ),
        (created(folder, "vdi", &["-f", "vdi", "1M"]), told, bad),
        // What nobody knows or can read. Offset 72: the incompatible features. Offset 32: how it is
        // encrypted, 2 being LUKS; qemu-img itself would time the key's derivation first, which it cannot
        // on every machine.
        (with(folder, "features", &good, 72, &[1 << 7]), qcow2, bad),
        (
            with(folder, "locked", &good, 32, &2u32.to_be_bytes()),
            qcow2,
            bad,
        ),
        // Cut off: in the header, in the tables, in the data.
        (sized("cut-header", &good, 60), qcow2, bad),
        (sized("cut-tables", &good, 3 << 16), qcow2, bad),
        (sized("cut-data", &filled, 1 << 20), qcow2, bad),
        // Absurd. Offset 24: the size of the disk; offset 36: the entries of the L1 table; offset 40: its place.
        (
            created(folder, "vast", &["-f", "qcow2", "1T"]),
            qcow2,
            large,
        ),
        (
            with(folder, "endless", &good, 24, &u64::MAX.to_be_bytes()),
            qcow2,
            large,
        ),
        (
            with(folder, "l1-entries", &good, 36, &u32::MAX.to_be_bytes()),
            qcow2,
            bad,
        ),
        (
            with(folder, "l1-place", &good, 40, &(1u64 << 60).to_be_bytes()),
            qcow2,
            bad,
        ),
        (sized("huge", &nothing, 8 << 40), raw, large),
        (sized("huge-told", &nothing, 8 << 40), told, bad),
        (sized("empty", &nothing, 0), told, bad),
        (sized("empty-raw", &nothing, 0), raw, bad),
        // Not what it is said to be.
        (good.clone(), raw, bad),
        (good, ImageFormat::Iso, bad),
        (
            with(folder, "both.iso", &iso, 0, header),
            ImageFormat::Iso,
            bad,
        ),
        (secret, qcow2, bad),
    ]
}

// gap 15
#[tokio::test(flavor = "multi_thread")]
async fn unsafe_and_misdeclared_images_are_refused_with_a_reason_and_leave_nothing() {
    let import = salvor_tests::run_folder::RunFolder::named("unsafe-images");
    let folder = import.path();
    let recorder = Recorder::new(&folder.join("tools"));
    let allowed = vec![toml::Value::from(folder.to_str().unwrap())];
    let settings = AgentSettings::default().set("import_dirs", allowed);
    let mut scene = Scene::with(recorder.settings(settings)).await;
    for (file, format, reason) in corpus(folder) {
        println!("{} as {format:?}", file.display());
        let declared = ImageSpec {
            format: format.into(),
            ..spec("bad")
        };
        let answer = by_path(&mut scene, file.to_str().unwrap(), declared).await;
        let answer = answer.map(tonic::Response::new);
        let refused = assert_refused(answer, Code::InvalidArgument, reason);
        println!("    {}", refused.message());
        if fs::metadata(&file).unwrap().len() < 4 << 20 {
            let sent = scene
                .client
                .try_import("bad", format, fs::read(&file).unwrap());
            assert_refused(sent.await, Code::InvalidArgument, reason);
        }
        assert_eq!(listed(&mut scene).await, []);
        assert_eq!(stored(&scene), Vec::<PathBuf>::new());
    }
    assert_eq!(recorder.runs(), Vec::<String>::new());

    // A CD with a disk image on it is a CD: nobody looks at what is on it.
    let iso = folder.join("disguised.iso");
    for format in [ImageFormat::Iso, ImageFormat::Unspecified] {
        let declared = ImageSpec {
            format: format.into(),
            ..spec("cd")
        };
        let image = by_path(&mut scene, iso.to_str().unwrap(), declared).await;
        let image = image.unwrap();
        assert_eq!(image.format(), ImageFormat::Iso);
        assert_eq!(image.virtual_size_bytes, fs::metadata(&iso).unwrap().len());
        assert_eq!(sha256(&scene.stored_file(&image)), sha256(&iso));
    }
    assert_eq!(recorder.runs(), Vec::<String>::new());

    // The recorder would have seen it: this is what the agent does run qemu-img for.
    scene.import_fixer().await;
    let actor = scene.another_actor(&tiny("witness")).await;
    let request = actor.rescue_request(DiskProtection::Overlay);
    scene.client.rescue(request).await.1.done();
    let request = actor.unrescue_request(OverlayDisposition::Commit);
    scene.client.unrescue(request).await.done();
    let runs = recorder.runs();
    assert_eq!(runs.len(), 1, "{runs:?}");
    assert!(runs[0].starts_with("qemu-img commit "), "{runs:?}");
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
            ..DeleteImageRequest::default()
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
