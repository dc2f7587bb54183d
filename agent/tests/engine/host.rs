// SPDX-License-Identifier: Apache-2.0
//! A host to work on: a state folder, disks outside of it, domains, and agents that come and go.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use nix::unistd::{Whence, lseek};
use salvor_agent::{
    core::{
        action::{
            Action, AdoptArgs, CreateArgs, NicArgs, NicConnection, RescueArgs, Shutdown,
            UnrescueArgs,
        },
        caller::Who,
        image::{ImageFormat, ImageRecord},
        layout::Layout,
        operation::OperationRecord,
        password::CryptHash,
        plan::Plan,
        reason::Refusal,
        record::{Flavor, Protection, ServerRecord},
    },
    dispatch::{Dispatcher, Settings, Submitted, Target},
    engine::{Engine, Probe},
    hypervisor::{Definition, Hypervisor as _, fake::FakeHypervisor},
    steps::{Steps, sweep},
    storage::qemu_img::QemuImg,
    store::{Request, Store},
};
use salvor_domain_templates::Templates;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::sync::watch;
use uuid::Uuid;

/// Everything here that takes a moment has to end within this time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An image to make servers from.
pub(crate) const BASE: Uuid = Uuid::from_u128(0xba5e);
/// A rescue image.
pub(crate) const RESCUE: Uuid = Uuid::from_u128(0x7e5c);
/// A rescue CD.
pub(crate) const CD: Uuid = Uuid::from_u128(0xcd);
/// The server that most tests are about.
pub(crate) const SERVER: Uuid = Uuid::from_u128(0x5e71);

/// The size of every disk here.
const DISK: usize = 128 << 10;

/// A host.
pub(crate) struct Host {
    pub(crate) dir: TempDir,
    pub(crate) fake: FakeHypervisor,
    databases: usize,
}

/// What is in the file of an image.
fn image_content(name: &str, format: ImageFormat) -> Vec<u8> {
    let mut content = vec![name.as_bytes()[0]; DISK];
    if format == ImageFormat::Iso {
        // The primary volume descriptor, and a volume of 64 blocks of 2,048 bytes.
        content[0x8000..0x8006].copy_from_slice(b"\x01CD001");
        content[0x8050..0x8054].copy_from_slice(&64u32.to_le_bytes());
        content[0x8080..0x8082].copy_from_slice(&2_048u16.to_le_bytes());
    }
    content
}

/// The record of an image.
pub(crate) fn image(id: Uuid, name: &str, format: ImageFormat) -> ImageRecord {
    ImageRecord {
        id,
        name: name.to_owned(),
        format,
        size: DISK as u64,
        virtual_size: DISK as u64,
        sha256: format!("{:x}", Sha256::digest(image_content(name, format))),
        file: None,
        properties: BTreeMap::new(),
        created_at_ms: 1,
    }
}

/// Templates take a while to be compiled in a debug build.
pub(crate) fn templates() -> Arc<Templates> {
    static TEMPLATES: OnceLock<Arc<Templates>> = OnceLock::new();
    Arc::clone(TEMPLATES.get_or_init(|| Arc::new(Templates::builtin().unwrap())))
}

impl Host {
    /// A host with an agent's empty store.
    pub(crate) fn new() -> Self {
        // In memory if that is possible: a test of crashes syncs a thousand times.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let host = Self {
            dir: dir.unwrap(),
            fake: FakeHypervisor::new(),
            databases: 0,
        };
        fs::create_dir_all(host.layout().images()).unwrap();
        fs::create_dir_all(host.layout().servers()).unwrap();
        fs::create_dir_all(host.outside()).unwrap();
        fs::create_dir_all(host.database().parent().unwrap()).unwrap();
        host
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.dir.path().join("state").to_str().unwrap())
    }

    /// A folder that is not the agent's, with the disks of domains that it adopts.
    pub(crate) fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    /// Where the agent's store is.
    pub(crate) fn database(&self) -> PathBuf {
        self.dir
            .path()
            .join(format!("store-{}/salvor.db", self.databases))
    }

    /// Imports the images.
    pub(crate) async fn add_images(&self, store: &Store) {
        for (id, name, format) in [
            (BASE, "base", ImageFormat::Raw),
            (RESCUE, "rescue", ImageFormat::Raw),
            (CD, "cd", ImageFormat::Iso),
        ] {
            let path = format!("{}/{id}.{format}", self.layout().images());
            fs::write(path, image_content(name, format)).unwrap();
            store
                .add_image(image(id, name, format), Request::default())
                .await
                .unwrap();
        }
    }

    /// Makes disks of a domain that somebody else made: a raw one, a qcow2 one, UEFI variables.
    pub(crate) fn foreign_domain(&self, uefi: bool) -> String {
        let outside = self.outside();
        fs::write(outside.join("root.raw"), vec![b'r'; DISK]).unwrap();
        let data = outside.join("data.qcow2");
        qemu(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                data.to_str().unwrap(),
                "128K",
            ],
        );
        qemu_io(&data, "qcow2", "write -q -P 0x64 0 4k");
        fs::write(outside.join("vars.fd"), vec![b'v'; 4096]).unwrap();
        let firmware = if uefi {
            format!(
                "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram>{}</nvram>",
                outside.join("vars.fd").display()
            )
        } else {
            String::new()
        };
        format!(
            "<domain type='qemu'>
  <name>foreign</name>
  <uuid>{SERVER}</uuid>
  <memory unit='KiB'>131072</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{firmware}</os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{root}'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{data}'/><target dev='vdb' bus='virtio'/></disk>
    <interface type='user'><mac address='52:54:00:00:00:01'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>
",
            root = outside.join("root.raw").display(),
            data = data.display(),
        )
    }

    /// Defines a domain, as somebody did long ago.
    pub(crate) async fn define(&self, xml: &str) {
        self.fake.define(xml).await.unwrap();
        self.fake.sync_definitions().await.unwrap();
    }

    /// Settings of an agent here.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            layout: self.layout(),
            virt_type: "qemu".to_owned(),
            reserve_bytes: 0,
            rescue_timeout_ms: 0,
            default_rescue_image: None,
            shutdown: PROMPT,
            saved_memory: self.dir.path().to_owned(),
            reclaim_ms: 0,
        }
    }

    /// Copies everything that is on the disks, and of the hypervisor. No agent may run.
    pub(crate) fn save(&self) -> Saved {
        // The store's thread closes its file after the last handle is gone, and the log goes then.
        let log = self.database().with_extension("db-wal");
        let deadline = Instant::now() + PATIENCE;
        while log.exists() {
            assert!(Instant::now() < deadline, "the store is still open");
            std::thread::yield_now();
        }
        let mut files = BTreeMap::new();
        for folder in ["state", "outside"] {
            read_tree(&self.dir.path().join(folder), &mut files);
        }
        let mut database = BTreeMap::new();
        read_tree(self.database().parent().unwrap(), &mut database);
        Saved {
            files,
            database: database.into_values().collect(),
            fake: self.fake.copy(),
        }
    }

    /// Puts everything back, the store in a new place: an agent that is not quite gone yet must not
    /// meet the next one there.
    pub(crate) fn restore(&mut self, saved: &Saved) {
        for folder in ["state", "outside"] {
            let path = self.dir.path().join(folder);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path).unwrap();
        }
        for entry in saved.files.values() {
            entry.write(&entry.path);
        }
        let _ = fs::remove_dir_all(self.database().parent().unwrap());
        self.databases += 1;
        let database = self.database();
        fs::create_dir_all(database.parent().unwrap()).unwrap();
        for entry in &saved.database {
            entry.write(&database.with_file_name(entry.path.file_name().unwrap()));
        }
        self.fake = saved.fake.copy();
    }

    /// An agent at this host, with its store as it is.
    pub(crate) async fn agent(&self, probe: Arc<dyn Probe>) -> Agent {
        Agent::start(self, self.settings(), probe).await
    }

    /// What there is to be seen of the host and of the record.
    pub(crate) async fn look(&self, agent: &Agent) -> Seen {
        let store = &agent.store;
        let mut record = store
            .server(SERVER)
            .map(|record| ServerRecord::clone(&record));
        if let Some(record) = &mut record {
            // What changes with every change, or with every look.
            record.revision = 0;
            record.updated_at_ms = 0;
            record.settled_at_ms = 0;
            record.power.observed_at_ms = 0;
            record.power.source = salvor_agent::core::state::ObservationSource::Poll;
            record.power.reason.clear();
            if let Some(rescue) = &mut record.rescue {
                rescue.started_at_ms = 0;
            }
            if let Some(deletion) = &mut record.deletion {
                deletion.at_ms = 0;
                deletion.reclaim_at_ms = 0;
            }
        }
        // A process of its own, so that nothing that was planned for the agent's happens here.
        let fake = self.fake.attach();
        let status = fake.domain(SERVER).await.unwrap();
        let xml = async |which| fake.domain_xml(SERVER, which).await.ok();
        Seen {
            record,
            power: status.as_ref().map(|status| status.power),
            memory: status.is_some_and(|status| status.managed_save),
            inactive: xml(Definition::Inactive).await,
            on_disk: fake.definition_on_disk(SERVER),
            live: xml(Definition::Live).await,
            autostart: fake.autostart(SERVER),
            saved: store.saved_definition(SERVER).await.unwrap(),
            known: (
                store.known_definition(SERVER).await.unwrap(),
                store.definitions_not_in_force().await.unwrap(),
            ),
            holders: store.image_holders().await.unwrap(),
            // Whatever was asked of the store came after what the end of an operation left to do there.
            password_kept: password_kept(&self.database()),
            files: hashes(self.dir.path()),
        }
    }
}

/// Is the hash of [`hash`] in the store, its log included?
pub(crate) fn password_kept(database: &Path) -> bool {
    let CryptHash(hash) = hash();
    [database.to_owned(), database.with_extension("db-wal")]
        .iter()
        .filter_map(|path| fs::read(path).ok())
        .any(|bytes| String::from_utf8_lossy(&bytes).contains(&hash))
}

/// A file or folder.
struct Entry {
    path: PathBuf,
    mode: u32,
    /// `None` for a folder.
    content: Option<Content>,
}

/// What is in a file, without its zeros: a config drive is large and empty.
struct Content {
    size: u64,
    /// Offset and bytes of each block that holds something.
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Content {
    fn read(path: &Path) -> Self {
        const BLOCK: u64 = 4096;
        let file = fs::File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        let mut blocks = Vec::new();
        let mut offset = 0;
        while offset < size {
            // No more data than this: an error says so.
            let Ok(data) = lseek(&file, offset.cast_signed(), Whence::SeekData) else {
                break;
            };
            offset = data.cast_unsigned() / BLOCK * BLOCK;
            let mut bytes = vec![0; usize::try_from(BLOCK.min(size - offset)).unwrap()];
            file.read_exact_at(&mut bytes, offset).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                blocks.push((offset, bytes));
            }
            offset += BLOCK;
        }
        Self { size, blocks }
    }

    fn write(&self, path: &Path) {
        let file = fs::File::create(path).unwrap();
        file.set_len(self.size).unwrap();
        for (offset, bytes) in &self.blocks {
            file.write_all_at(bytes, *offset).unwrap();
        }
    }

    fn hash(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(self.size.to_be_bytes());
        for (offset, bytes) in &self.blocks {
            digest.update(offset.to_be_bytes());
            digest.update(bytes);
        }
        format!("{:x}", digest.finalize())
    }
}

impl Entry {
    fn write(&self, path: &Path) {
        match &self.content {
            None => fs::create_dir_all(path).unwrap(),
            Some(content) => content.write(path),
        }
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode)).unwrap();
    }
}

/// A host as it was at some time.
pub(crate) struct Saved {
    files: BTreeMap<PathBuf, Entry>,
    database: Vec<Entry>,
    fake: FakeHypervisor,
}

/// What can be seen of a host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) record: Option<ServerRecord>,
    pub(crate) power: Option<salvor_agent::core::state::PowerState>,
    pub(crate) inactive: Option<String>,
    /// The inactive definition after a power cut.
    pub(crate) on_disk: Option<String>,
    pub(crate) live: Option<String>,
    /// Memory was saved of it.
    pub(crate) memory: bool,
    /// Is it started with the host?
    pub(crate) autostart: bool,
    pub(crate) saved: Option<String>,
    /// What is known of its definition, and how much was written that did not come into force.
    pub(crate) known: (Option<String>, u32),
    pub(crate) holders: Vec<(Uuid, String)>,
    /// Is the hash of the password somewhere in the store's files?
    pub(crate) password_kept: bool,
    /// A hash of each file, nothing for folders.
    pub(crate) files: BTreeMap<String, String>,
}

impl Seen {
    /// How it differs from another, in words.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
            let (a, b) = (format!("{a:?}"), format!("{b:?}"));
            if a != b {
                found.push(format!("{what}:\n  {a}\n  {b}"));
            }
        };
        compare("record", &self.record, &other.record);
        compare("power", &self.power, &other.power);
        compare("inactive definition", &self.inactive, &other.inactive);
        compare("definition on the disk", &self.on_disk, &other.on_disk);
        compare("live definition", &self.live, &other.live);
        compare("saved memory", &self.memory, &other.memory);
        compare("known definition", &self.known, &other.known);
        compare("autostart", &self.autostart, &other.autostart);
        compare("saved definition", &self.saved, &other.saved);
        compare("holders", &self.holders, &other.holders);
        compare("password", &self.password_kept, &other.password_kept);
        for name in self.files.keys().chain(other.files.keys()) {
            compare(name, &self.files.get(name), &other.files.get(name));
        }
        found
    }
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        visit(&path, &metadata);
        if metadata.is_dir() {
            walk(&path, visit);
        }
    }
}

fn read_tree(folder: &Path, found: &mut BTreeMap<PathBuf, Entry>) {
    walk(folder, &mut |path, metadata| {
        let entry = Entry {
            path: path.to_owned(),
            mode: metadata.permissions().mode() & 0o7777,
            content: metadata.is_file().then(|| Content::read(path)),
        };
        found.insert(path.to_owned(), entry);
    });
}

fn hashes(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut overlays = Vec::new();
    for part in ["state", "outside"] {
        walk(&folder.join(part), &mut |path, metadata| {
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            // When a guest was about to be started is another time in every run, and a start that is
            // taken back leaves the note of a boot that said nothing.
            if name.starts_with("state/console") {
                return;
            }
            if name.ends_with(".overlay") {
                overlays.push((name, path.to_owned()));
                return;
            }
            // Numbers of files that are others on every host.
            let is_note = name.ends_with("/owners");
            let hash = if metadata.is_dir() || is_note {
                String::new()
            } else {
                Content::read(path).hash()
            };
            found.insert(name, hash);
        });
    }
    // What counts is what they show: once one is committed, an empty one shows the same.
    for (name, path) in overlays {
        found.insert(name, content(&path, "qcow2"));
    }
    found
}

pub(crate) fn qemu(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

/// Writes to a disk as a guest would.
pub(crate) fn qemu_io(path: &Path, format: &str, command: &str) {
    qemu(
        "qemu-io",
        &["-f", format, "-c", command, path.to_str().unwrap()],
    );
}

/// What a guest sees on a disk.
pub(crate) fn content(path: &Path, format: &str) -> String {
    let raw = path.with_extension("seen");
    qemu(
        "qemu-img",
        &[
            "convert",
            "-f",
            format,
            "-O",
            "raw",
            path.to_str().unwrap(),
            raw.to_str().unwrap(),
        ],
    );
    let hash = format!("{:x}", Sha256::digest(fs::read(&raw).unwrap()));
    fs::remove_file(raw).unwrap();
    hash
}

/// An agent: everything that one process of the daemon has.
pub(crate) struct Agent {
    pub(crate) store: Store,
    pub(crate) engine: Engine,
    pub(crate) dispatcher: Dispatcher,
    pub(crate) fake: FakeHypervisor,
    pub(crate) swept: Vec<String>,
    pub(crate) draining: watch::Sender<bool>,
}

impl Agent {
    /// Starts as the daemon does: the store, then what nobody knows of, then what was under way.
    pub(crate) async fn start(host: &Host, settings: Settings, probe: Arc<dyn Probe>) -> Self {
        let store = Store::open(&host.database(), 1_000).unwrap();
        let fake = host.fake.attach();
        let layout = settings.layout.clone();
        let swept = sweep(&store, &layout).await.unwrap();
        let hypervisor = Arc::new(fake.clone());
        let steps = Steps::new(
            Arc::clone(&hypervisor) as _,
            store.clone(),
            QemuImg::default(),
            layout,
        );
        let engine = Engine::new(store.clone(), Arc::new(steps), probe);
        engine.recover().await.unwrap();
        let (draining, drains) = watch::channel(false);
        let dispatcher = Dispatcher::new(
            store.clone(),
            engine.clone(),
            hypervisor,
            templates(),
            settings,
            drains,
        );
        Self {
            store,
            engine,
            dispatcher,
            fake,
            swept,
            draining,
        }
    }

    /// Asks for an action as nobody in particular.
    pub(crate) async fn submit(
        &self,
        target: Target,
        action: Action,
    ) -> Result<Submitted, Refusal> {
        self.dispatcher.submit(target, action, anonymous()).await
    }

    /// Waits until an operation has ended.
    pub(crate) async fn ended(&self, id: Uuid) -> OperationRecord {
        let view = self.engine.wait(id, PATIENCE).await.unwrap();
        let operation = view.expect("the operation is kept").operation;
        assert!(operation.state.is_final(), "{operation:#?}");
        OperationRecord::clone(&operation)
    }

    /// Does an action to its end.
    pub(crate) async fn carry_out(&self, target: Target, action: Action) -> OperationRecord {
        let submitted = self.submit(target, action).await.unwrap();
        self.ended(submitted.operation.id).await
    }

    /// Does an action, which has to succeed.
    pub(crate) async fn succeed(&self, target: Target, action: Action) {
        let operation = self.carry_out(target, action).await;
        assert_eq!(operation.state.name(), "done", "{operation:#?}");
    }

    /// The plan of an action.
    pub(crate) async fn plan(&self, target: Target, action: &Action) -> Arc<Plan> {
        let preview = self
            .dispatcher
            .preview(target, action, &Who::default())
            .await
            .unwrap();
        assert_eq!(preview.refusal, None);
        Arc::new(preview.plan)
    }

    /// The server's record.
    pub(crate) fn record(&self) -> Arc<ServerRecord> {
        self.store.server(SERVER).expect("there is the server")
    }
}

/// A call without a request id.
pub(crate) fn anonymous() -> Request {
    Request {
        id: None,
        body_hash: String::new(),
        caller: "test".to_owned(),
        who: Who::default(),
    }
}

/// A guest is asked, and ended soon.
pub(crate) const PROMPT: Shutdown = Shutdown {
    timeout_ms: 200,
    retry_ms: 50,
};

/// A guest is ended.
pub(crate) const AT_ONCE: Shutdown = Shutdown {
    timeout_ms: 0,
    retry_ms: 0,
};

pub(crate) fn create(powered_off: bool) -> Action {
    Action::Create(Box::new(CreateArgs {
        id: SERVER,
        name: "web".to_owned(),
        image: BASE,
        flavor: Flavor {
            vcpus: 1,
            memory_mib: 128,
            disk_gib: 0,
        },
        nics: vec![NicArgs {
            connection: NicConnection::User,
            mac: None,
            model: "virtio".to_owned(),
        }],
        password: hash(),
        hostname: "web".to_owned(),
        public_keys: BTreeMap::new(),
        user_data: None,
        metadata: BTreeMap::new(),
        machine: None,
        uefi: false,
        powered_off,
    }))
}

pub(crate) fn adopt() -> Action {
    Action::Adopt(AdoptArgs { name: None })
}

pub(crate) fn hash() -> CryptHash {
    CryptHash("$6$salt$hash".to_owned())
}

/// A rescue that writes to the disks, from [`RESCUE`].
pub(crate) fn rescue() -> RescueArgs {
    RescueArgs {
        image: Some(RESCUE),
        mode: None,
        bus: None,
        device: None,
        protection: Protection::ReadWrite,
        password: hash(),
        user_data: None,
        timeout_ms: None,
        timeout_overlay: None,
        shutdown: PROMPT,
    }
}

pub(crate) fn rescue_action() -> Action {
    Action::Rescue(Box::new(rescue()))
}

/// An unrescue that starts the server.
pub(crate) fn unrescue() -> UnrescueArgs {
    UnrescueArgs {
        overlay: None,
        restore_power: false,
        shutdown: PROMPT,
    }
}

pub(crate) const ON: Target = Target::Server(SERVER);
pub(crate) const NEW: Target = Target::New(SERVER);
