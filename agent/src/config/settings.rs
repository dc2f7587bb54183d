// SPDX-License-Identifier: Apache-2.0
//! Every setting: its name, type, default, rule and explanation, each written once.
//!
//! The macro makes the structs, their defaults and one walk over all settings. Reading a file, `check-config` and the
//! reference page are visitors on that walk, so none of them can know a key that another does not.

use std::marker::PhantomData;
use std::path::PathBuf;
use std::time::Duration;

use super::kinds::{
    AbsolutePath, AbsolutePaths, Choice, Count, Flag, Kind, LibvirtUri, Listen, Maybe, Name, OneOf,
    Size, SocketMode, Span, SpanOrNever,
};
use super::units::ByteSize;
use super::virt_type::VirtType;

/// What is fixed about one setting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    /// The table it stands in; empty at the top.
    pub(super) section: &'static str,
    /// Its name within the table.
    pub(super) key: &'static str,
    /// What it is for, line by line.
    // Only the reference page shows it, and that is made by a test.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(super) help: &'static [&'static str],
}

impl Setting {
    /// The name as messages have it: `libvirt.uri`.
    pub(super) fn name(&self) -> String {
        if self.section.is_empty() {
            self.key.to_owned()
        } else {
            format!("{}.{}", self.section, self.key)
        }
    }
}

/// What walks over all settings in the order of this file.
pub(super) trait Visitor {
    /// A table begins. The settings at the top have none.
    fn section(&mut self, name: &'static str, help: &'static [&'static str]);
    /// One setting.
    fn setting<K: Kind>(&mut self, setting: Setting, kind: &K, value: &mut K::Value);
}

macro_rules! settings {
    (
        $(#[doc = $top_doc:literal])+
        $top:ident {
            $( $(#[doc = $help:literal])+ $key:ident: $type:ty = $default:expr, $kind:expr; )+
        }
        $(
            $(#[doc = $section_help:literal])+
            $section:ident: $table:ident {
                $( $(#[doc = $sub_help:literal])+ $sub:ident: $sub_type:ty = $sub_default:expr, $sub_kind:expr; )+
            }
        )+
    ) => {
        $(#[doc = $top_doc])+
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $top {
            $( $(#[doc = $help])+ pub $key: $type, )+
            $( $(#[doc = $section_help])+ pub $section: $table, )+
        }

        $(
            $(#[doc = $section_help])+
            #[derive(Debug, Clone, PartialEq, Eq)]
            pub struct $table {
                $( $(#[doc = $sub_help])+ pub $sub: $sub_type, )+
            }

            impl Default for $table {
                fn default() -> Self {
                    Self { $( $sub: $sub_default, )+ }
                }
            }
        )+

        impl Default for $top {
            fn default() -> Self {
                Self {
                    $( $key: $default, )+
                    $( $section: $table::default(), )+
                }
            }
        }

        impl $top {
            /// Shows every setting to `visitor`.
            pub(super) fn visit(&mut self, visitor: &mut impl Visitor) {
                $(
                    visitor.setting(
                        Setting { section: "", key: stringify!($key), help: &[$($help),+] },
                        &$kind,
                        &mut self.$key,
                    );
                )+
                $(
                    visitor.section(stringify!($section), &[$($section_help),+]);
                    $(
                        visitor.setting(
                            Setting {
                                section: stringify!($section),
                                key: stringify!($sub),
                                help: &[$($sub_help),+],
                            },
                            &$sub_kind,
                            &mut self.$section.$sub,
                        );
                    )+
                )+
            }
        }
    };
}

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

const fn span(min: Duration, max: Duration) -> Span {
    Span { min, max }
}

/// A deadline of something that ends in a moment when all is well.
const SHORT: Span = span(Duration::from_millis(100), secs(HOUR));

settings! {
    /// Everything that can be configured. Checked as a whole before anything is opened.
    Config {
        /// Where records, images and the disks of servers are kept. One agent owns it; it is made if it does not exist.
        /// QEMU must be able to reach it.
        state_dir: PathBuf = PathBuf::from("/var/lib/salvor"), AbsolutePath;

        /// Where the agent listens. Only Unix sockets: TCP comes together with mutual TLS and not before.
        listen: PathBuf = PathBuf::from("/run/salvor/salvor.sock"), Listen;

        /// The mode of the socket. Who can write to it commands every guest on this host.
        socket_mode: u32 = 0o660, SocketMode;

        /// The group that the socket is given to. Not set: the group that the agent runs as.
        socket_group: Option<String> = None, Maybe(Name);

        /// What new guests run on. `auto` is KVM if `/dev/kvm` opens for reading and writing and the CPU shows vmx or
        /// svm, else emulation.
        virt_type: VirtType = VirtType::Auto, OneOf(PhantomData::<VirtType>);

        /// A folder with domain templates that stand in for the built-in ones. Not set: the built-in ones.
        templates_dir: Option<PathBuf> = None, Maybe(AbsolutePath);

        /// Folders of this host from which images may be imported by path. Empty: none.
        import_dirs: Vec<PathBuf> = Vec::new(), AbsolutePaths;
    }

    /// The link to libvirt.
    libvirt: LibvirtConfig {
        /// Which libvirt to use. It must be this host's.
        uri: String = "qemu:///system".to_owned(), LibvirtUri;

        /// The folder in which libvirt keeps the definitions of domains. It is synced before an operation ends that
        /// changed one, so that a power cut cannot bring the old one back. If it does not exist, everything is synced.
        definitions: PathBuf = PathBuf::from("/etc/libvirt/qemu"), AbsolutePath;

        /// The folder in which libvirt saves the memory of guests that are suspended. A suspend is refused if it has
        /// no room for it.
        saved_memory: PathBuf = PathBuf::from("/var/lib/libvirt/qemu/save"), AbsolutePath;

        /// How long one call may take before it counts as stuck.
        call_timeout: Duration = secs(30), SHORT;

        /// How long the start of a guest may take.
        start_timeout: Duration = secs(120), SHORT;

        /// How long the destruction of a guest may take. libvirt itself waits up to 30 s for a process that does not
        /// go away.
        destroy_timeout: Duration = secs(60), SHORT;

        /// How often the link is probed while it is silent. libvirt counts whole seconds.
        keepalive_interval: Duration = secs(5), span(secs(1), secs(HOUR));

        /// After how many probes without an answer the link is dropped and made anew.
        keepalive_count: u32 = 3, Count { min: 1, max: 100 };

        /// How often all domains are looked at, in case an event was lost.
        resync_interval: Duration = secs(60), span(secs(1), secs(DAY));
    }

    /// Rescue.
    rescue: RescueConfig {
        /// The image (id, beginning of one, or name) to boot when the request names none and the server has no base
        /// image. Not set: such a request is refused.
        default_image: Option<String> = None, Maybe(Name);

        /// After how long a rescued server is unrescued by itself, unless the request says otherwise.
        timeout: Option<Duration> = None, SpanOrNever(span(secs(1), secs(365 * DAY)));
    }

    /// How guests are asked to shut down before they are powered off.
    shutdown: ShutdownConfig {
        /// How long a guest may take to shut down. `"0"`: it is powered off at once.
        timeout: Duration = secs(60), span(Duration::ZERO, secs(DAY));

        /// How often the request is sent again meanwhile. Guests that are still booting miss the first one.
        retry_interval: Duration = secs(10), span(secs(1), secs(HOUR));
    }

    /// Delete.
    delete: DeleteConfig {
        /// How long a deleted server can be restored: until then it is only powered off. `"0"`: a delete removes at
        /// once.
        reclaim_interval: Duration = Duration::ZERO, span(Duration::ZERO, secs(365 * DAY));
    }

    /// Disks and images.
    storage: StorageConfig {
        /// How much must stay free where `state_dir` has its `servers`, and where it has its `images`. What would
        /// go below is refused.
        reserve: ByteSize = ByteSize::from_mib(256), Size { min: ByteSize::from_bytes(0), max: ByteSize::from_gib(1 << 20) };

        /// The largest image, as a file and as the disk that it describes.
        max_image_size: ByteSize = ByteSize::from_gib(64), Size { min: ByteSize::from_mib(1), max: ByteSize::from_gib(1 << 20) };

        /// How much memory qemu-img may use.
        qemu_img_memory: ByteSize = ByteSize::from_gib(2), Size { min: ByteSize::from_mib(64), max: ByteSize::from_gib(1024) };
    }

    /// What guests say on their serial ports.
    console: ConsoleConfig {
        /// How many boots of a server are told apart in its console log. What older ones said is dropped at the next
        /// start.
        boots: u32 = 10, Count { min: 1, max: 1000 };

        /// How much of a server's console log is kept, all its boots together. The oldest is dropped. Of the logs of
        /// adopted servers no more is shown either, but their files belong to whoever made the domain and stay as they
        /// are.
        max_size: ByteSize = ByteSize::from_mib(16), Size { min: ByteSize::from_mib(1), max: ByteSize::from_gib(64) };
    }

    /// The gRPC API.
    api: ApiConfig {
        /// Whether the API describes itself to tools (gRPC server reflection).
        reflection: bool = true, Flag;
    }

    /// State events.
    events: EventsConfig {
        /// How many revisions are kept for watchers that come back.
        keep: u32 = 100_000, Count { min: 1000, max: 100_000_000 };
    }

    /// Finished operations.
    operations: OperationsConfig {
        /// How long a finished operation can be looked up. It is also how long a request id is remembered.
        keep: Duration = secs(30 * DAY), span(secs(HOUR), secs(3650 * DAY));
    }

    /// What is done about a guest that is not as it should be. Everything is recorded and shown in any case.
    policy: PolicyConfig {
        /// A guest that crashed: `record` leaves it off, `start` starts it again, after longer and longer pauses if it
        /// crashes again.
        crashed: Reaction = Reaction::Record, OneOf(PhantomData::<Reaction>);

        /// A guest that shut itself down, or was asked to by somebody past the agent: `record` leaves it off, `start`
        /// starts it again.
        stopped_by_itself: Reaction = Reaction::Record, OneOf(PhantomData::<Reaction>);
    }

    /// What happens after a reboot of the host.
    autostart: AutostartConfig {
        /// Whether servers that ran before are started again, in the order of their numbers and of their making. libvirt's
        /// own autostart flags are left as they are, and what libvirt has started is left alone.
        enabled: bool = false, Flag;

        /// How many are started at a time.
        parallel: u32 = 2, Count { min: 1, max: 64 };

        /// How long to wait before the first, once libvirt is there.
        delay: Duration = Duration::ZERO, span(Duration::ZERO, secs(HOUR));
    }

    /// The log, which goes to standard error.
    log: LogConfig {
        /// `human` is one line of text per event, `json` one object per line; `auto` is human on a terminal, else JSON.
        format: LogFormat = LogFormat::Auto, OneOf(PhantomData::<LogFormat>);

        /// From which level on the agent's own events are logged; of its libraries, warnings and errors are. The
        /// environment variable `SALVOR_LOG` overrides it (`debug`, or filters such as `salvor=debug,h2=info`).
        level: LogLevel = LogLevel::Info, OneOf(PhantomData::<LogLevel>);
    }

    /// The end of the agent's life.
    drain: DrainConfig {
        /// After SIGTERM or SIGINT no new work is accepted, and running steps may end within this time. What does not
        /// is continued by the next start. A second signal ends the agent at once.
        timeout: Duration = secs(30), span(Duration::ZERO, secs(HOUR));
    }
}

/// What is done about a guest that should run and is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// It is recorded.
    Record,
    /// And started again.
    Start,
}

impl Choice for Reaction {
    const ALL: &'static [(&'static str, Self)] =
        &[("record", Self::Record), ("start", Self::Start)];
}

/// The setting `log.format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Human on a terminal, else JSON.
    Auto,
    /// One line of text per event.
    Human,
    /// One JSON object per line.
    Json,
}

impl Choice for LogFormat {
    const ALL: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("human", Self::Human),
        ("json", Self::Json),
    ];
}

/// The setting `log.level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Only what failed.
    Error,
    /// And what an operator should look at.
    Warn,
    /// And what the agent does.
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl Choice for LogLevel {
    const ALL: &'static [(&'static str, Self)] = &[
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
        ("trace", Self::Trace),
    ];
}

impl LogLevel {
    /// The level's word in the configuration and in filters.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.word()
    }
}
