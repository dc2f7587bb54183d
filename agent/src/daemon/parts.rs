// SPDX-License-Identifier: Apache-2.0
//! Puts the agent's parts together: store, libvirt, steps, engine, dispatcher, observer, API.

use std::{num::NonZeroUsize, path::Path, sync::Arc, time::Duration};

use salvor_domain_templates::Templates;
use tokio::sync::watch;
use uuid::Uuid;

use super::{DaemonError, Drain, Services, Thoroughness, check_templates, load_templates};
use crate::{
    api,
    config::{Config, Reaction},
    console::{BootNotes, Limits, Logs, Ports},
    core::{action::Shutdown, errors::chain, layout::Layout, reconcile::Policy},
    dispatch::{Dispatcher, Settings},
    engine::{Engine, Probe, now_ms},
    hypervisor::Hypervisor,
    libvirt::{self, Libvirt},
    observe::{Autostart, Observer},
    steps::{self, Steps},
    storage::{
        files::{self, DIR_MODE},
        images::ImageFiles,
        inspect,
        qemu_img::{self, QemuImg},
    },
    store::Store,
};

/// The store's file in the state folder.
const STORE_FILE: &str = "salvor.db";

/// Operations that ended long ago are forgotten so often.
const FORGET_EVERY: Duration = Duration::from_secs(3600);

/// When servers were seen last is written so often, and at the end of the agent.
const SAVE_OBSERVATIONS_EVERY: Duration = Duration::from_secs(120);

/// A store that cannot be written is tried again, and spoken of, so often.
const TRY_TO_WRITE_EVERY: Duration = Duration::from_secs(60);

/// A change of the store takes milliseconds. One that takes this long hangs in the disk, and so does
/// everything that the agent would do: the service manager is to know.
const STORE_LIMIT: Duration = Duration::from_secs(60);

/// Opens everything, takes up what was under way, and begins to observe.
pub(super) async fn assemble(
    config: &Config,
    boot: Uuid,
    drain: &Drain,
) -> Result<Services, DaemonError> {
    let layout = open_folders(config)?;
    let templates = templates_in_force(config.templates_dir.as_deref()).await?;
    let store = open_store(config).await?;
    // Without it nothing new begins; what is under way has to be carried on all the same.
    if let Err(error) = store.keep_room().await {
        tracing::error!(error = %chain(&error), "the store has no room to spare");
    }
    tokio::spawn(try_to_write(store.clone()));
    note_boot(&store, boot, config).await?;
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(open_libvirt(config)?);
    let images = open_images(config, &layout)?;
    sweep(&store, &layout, &images).await?;

    let limits = Limits {
        boots: config.console.boots,
        bytes: config.console.max_size.bytes(),
    };
    let boots = BootNotes::new(layout.clone(), limits.boots);
    let logs = Logs::new(
        Arc::clone(&hypervisor),
        store.clone(),
        layout.clone(),
        limits,
    );
    let engine = engine(config, &store, &hypervisor, &layout, boots)?;
    let draining = draining(drain);
    let dispatcher = Dispatcher::new(
        store.clone(),
        engine.clone(),
        Arc::clone(&hypervisor),
        templates,
        settings(config, layout),
        draining.clone(),
    );
    take_up(&engine).await?;
    let observer = Observer::new(
        store.clone(),
        Arc::clone(&hypervisor),
        dispatcher.clone(),
        config.libvirt.resync_interval,
    )
    .with_policy(Policy {
        start_crashed: config.policy.crashed == Reaction::Start,
        start_stopped_by_itself: config.policy.stopped_by_itself == Reaction::Start,
    });
    let observer = match autostart(config) {
        Some(autostart) => observer.with_autostart(autostart),
        None => observer,
    };
    tokio::spawn(observer.run(draining.clone()));
    tokio::spawn(forget_operations(
        store.clone(),
        config.operations.keep,
        draining.clone(),
    ));
    tokio::spawn(save_observations(store.clone(), draining.clone()));
    tokio::spawn(logs.clone().keep_within_limits(draining.clone()));
    services(api::Parts {
        dispatcher,
        engine,
        store,
        ports: Ports::new(Arc::clone(&hypervisor)),
        logs,
        hypervisor,
        images,
        host: api::HostSettings {
            libvirt_uri: config.libvirt.uri.clone(),
            boot_id: boot.to_string(),
            import_dirs: config.import_dirs.clone(),
            reflection: config.api.reflection,
        },
        draining,
    })
}

fn open_folders(config: &Config) -> Result<Layout, DaemonError> {
    let layout = Layout::new(config.state_dir.to_string_lossy());
    for folder in [layout.images(), layout.servers()] {
        files::ensure_dir(Path::new(&folder), DIR_MODE).map_err(DaemonError::State)?;
    }
    Ok(layout)
}

/// The templates, held against this host's libvirt. Those of an operator must pass before anything
/// begins; the built-in ones are checked meanwhile, for what fails there a restart does not mend.
async fn templates_in_force(folder: Option<&Path>) -> Result<Arc<Templates>, DaemonError> {
    let templates = Arc::new(load_templates(folder)?);
    let check = Arc::clone(&templates);
    let Some(folder) = folder else {
        tokio::task::spawn_blocking(move || {
            match check_templates(&check, Thoroughness::EachPiece) {
                Ok(checked) => {
                    tracing::info!(validated = checked.validated, "built-in templates checked")
                }
                Err(error) => tracing::error!(error = %chain(&error),
                    "this host's libvirt does not take what the built-in templates give; creating and rescuing servers will be refused (see salvord check-templates)"),
            }
        });
        return Ok(templates);
    };
    let checked =
        tokio::task::spawn_blocking(move || check_templates(&check, Thoroughness::Everything))
            .await
            .map_err(|_| DaemonError::Panicked { part: "templates" })??;
    tracing::info!(templates_dir = %folder.display(), rendered = checked.rendered, "templates checked");
    Ok(templates)
}

async fn open_store(config: &Config) -> Result<Store, DaemonError> {
    let path = config.state_dir.join(STORE_FILE);
    let keep = config.events.keep;
    // Definitions carry what libvirt keeps in them, passwords of consoles included: the file is made
    // before SQLite makes it readable for others, and its log files take its mode.
    tokio::task::spawn_blocking(move || {
        files::create_private(&path).map_err(DaemonError::State)?;
        Ok(Store::open(&path, keep)?)
    })
    .await
    .map_err(|_| DaemonError::Panicked { part: "store" })?
}

/// Before anything is taken up: what ran when the host went down is what the records say now.
async fn note_boot(store: &Store, boot: Uuid, config: &Config) -> Result<(), DaemonError> {
    let ran = store.note_boot(boot, config.autostart.enabled).await?;
    if ran > 0 {
        tracing::info!(
            servers = ran,
            "the host was rebooted since the agent ran last"
        );
    }
    Ok(())
}

fn autostart(config: &Config) -> Option<Autostart> {
    let parallel = usize::try_from(config.autostart.parallel).unwrap_or(1);
    config.autostart.enabled.then_some(Autostart {
        parallel: NonZeroUsize::new(parallel).unwrap_or(NonZeroUsize::MIN),
        delay: config.autostart.delay,
    })
}

fn open_libvirt(config: &Config) -> Result<Libvirt, DaemonError> {
    let from = &config.libvirt;
    Ok(Libvirt::open(libvirt::Config {
        definitions: from.definitions.clone(),
        call_timeout: from.call_timeout,
        start_timeout: from.start_timeout,
        destroy_timeout: from.destroy_timeout,
        keepalive_interval: from.keepalive_interval,
        keepalive_count: from.keepalive_count,
        ..libvirt::Config::new(from.uri.clone())
    })?)
}

fn open_images(config: &Config, layout: &Layout) -> Result<ImageFiles, DaemonError> {
    let limit = config.storage.max_image_size.bytes();
    let limits = inspect::Limits {
        file_size: limit,
        virtual_size: limit,
        ..inspect::Limits::default()
    };
    let reserve = config.storage.reserve.bytes();
    ImageFiles::new(layout.images().into(), limits, reserve).map_err(DaemonError::State)
}

/// Removes what a crash or a failed removal left and nobody knows any more, and tells of what is not
/// the agent's to remove.
async fn sweep(store: &Store, layout: &Layout, images: &ImageFiles) -> Result<(), DaemonError> {
    let records = store.images().await?.into_iter();
    let known = records.map(|(image, _)| image.id).collect();
    let swept = images.sweep(&known).map_err(DaemonError::State)?;
    if swept.parts > 0 {
        tracing::info!(
            count = swept.parts,
            "removed images that were not wholly imported"
        );
    }
    for path in swept.unknown {
        tracing::warn!(path = %path.display(), "an image without a record is left alone; remove it if it is not wanted");
    }
    steps::sweep(store, layout).await?;
    Ok(())
}

fn engine(
    config: &Config,
    store: &Store,
    hypervisor: &Arc<dyn Hypervisor>,
    layout: &Layout,
    boots: BootNotes,
) -> Result<Engine, DaemonError> {
    let qemu_img = QemuImg {
        limits: qemu_img::Limits {
            address_space: config.storage.qemu_img_memory.bytes(),
            ..qemu_img::Limits::default()
        },
        ..QemuImg::default()
    };
    let steps = Steps::new(
        Arc::clone(hypervisor),
        store.clone(),
        qemu_img,
        layout.clone(),
    )
    .with_boots(boots);
    Ok(Engine::new(store.clone(), Arc::new(steps), probe()?))
}

/// Goes on with the operations that an earlier run of the agent left.
async fn take_up(engine: &Engine) -> Result<(), DaemonError> {
    let recovered = engine.recover().await?;
    if recovered > 0 {
        tracing::warn!(
            operations = recovered,
            "took up operations that were under way"
        );
    }
    Ok(())
}

fn services(parts: api::Parts) -> Result<Services, DaemonError> {
    let (engine, store) = (parts.engine.clone(), parts.store.clone());
    let (link, writable, ending) = (parts.hypervisor.link(), store.writable(), store.clone());
    Ok(Services {
        routes: api::routes(parts)?,
        link,
        need_link: api::NEED_LINK,
        writable,
        at_rest: Box::pin(async move {
            engine.at_rest().await;
            save_observations_now(&ending).await;
        }),
        progress: Arc::new(move || store.gets_on(STORE_LIMIT)),
    })
}

fn settings(config: &Config, layout: Layout) -> Settings {
    let chosen = config.virt_type.choose();
    tracing::info!(virt_type = chosen.domain_type.as_str(), why = %chosen.why, "domain type of new servers");
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Settings {
        layout,
        virt_type: chosen.domain_type.as_str().to_owned(),
        reserve_bytes: config.storage.reserve.bytes(),
        rescue_timeout_ms: config.rescue.timeout.map_or(0, millis),
        default_rescue_image: config.rescue.default_image.clone(),
        shutdown: Shutdown {
            timeout_ms: millis(config.shutdown.timeout),
            retry_ms: millis(config.shutdown.retry_interval),
        },
        saved_memory: config.libvirt.saved_memory.clone(),
        reclaim_ms: millis(config.delete.reclaim_interval),
    }
}

/// The agent's phase as the parts need it: is it still taking work?
fn draining(drain: &Drain) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    let drain = drain.clone();
    tokio::spawn(async move {
        drain.draining().await;
        sender.send_replace(true);
        // The value must outlive its receivers, which end with the process.
        sender.closed().await;
    });
    receiver
}

async fn forget_operations(store: Store, keep: Duration, mut stop: watch::Receiver<bool>) {
    loop {
        let keep_ms = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        if let Err(error) = store
            .forget_operations(now_ms().saturating_sub(keep_ms))
            .await
        {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "old operations cannot be forgotten"
            );
        }
        if tokio::time::timeout(FORGET_EVERY, stop.wait_for(|stop| *stop))
            .await
            .is_ok()
        {
            return;
        }
    }
}

/// While the store cannot be written, says so and tries, so that it is known when it can be again: work
/// that waits for that tries for itself, but there may be none.
async fn try_to_write(store: Store) {
    let mut writable = store.writable();
    while writable.wait_for(|writable| !*writable).await.is_ok() {
        tracing::error!(
            "the store cannot be written: nothing new begins, and guests may be off half-way; is the state folder's filesystem full?"
        );
        let again = writable.wait_for(|writable| *writable);
        let told = tokio::time::timeout(TRY_TO_WRITE_EVERY, again).await;
        match told.map(|told| told.map(|_| ())) {
            Ok(Ok(_)) => tracing::info!("the store can be written again"),
            Ok(Err(_)) => return,
            Err(_) => {
                if store.keep_room().await.is_ok() {
                    tracing::info!("the store can be written again");
                }
            }
        }
    }
}

async fn save_observations(store: Store, mut stop: watch::Receiver<bool>) {
    while tokio::time::timeout(SAVE_OBSERVATIONS_EVERY, stop.wait_for(|stop| *stop))
        .await
        .is_err()
    {
        save_observations_now(&store).await;
    }
}

async fn save_observations_now(store: &Store) {
    if let Err(error) = store.save_observations().await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "when servers were seen last cannot be written"
        );
    }
}

#[cfg(not(feature = "failpoints"))]
#[allow(
    clippy::unnecessary_wraps,
    reason = "the build for tests can fail here"
)]
fn probe() -> Result<Arc<dyn Probe>, DaemonError> {
    Ok(Arc::new(crate::engine::NoProbe))
}

#[cfg(feature = "failpoints")]
fn probe() -> Result<Arc<dyn Probe>, DaemonError> {
    let probe =
        crate::engine::EnvProbe::from_env().map_err(|part| DaemonError::Failpoint { part })?;
    Ok(Arc::new(probe))
}
