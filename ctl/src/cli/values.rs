// SPDX-License-Identifier: Apache-2.0
//! Values of arguments, and the API's values that they stand for.

use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueEnum, error::ErrorKind,
};
use salvor_proto::v1::{self, network_interface_spec::Connection};

/// Defines an argument's values, their help and their values in the API.
macro_rules! values {
    ($(#[$about:meta])* $name:ident => $api:ident { $($(#[$help:meta])* $value:ident => $to:ident,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $name { $($(#[$help])* $value,)+ }

        impl $name {
            /// The API's value.
            pub(crate) fn api(self) -> i32 {
                match self { $(Self::$value => v1::$api::$to.into(),)+ }
            }
        }
    };
}

values! {
    /// `--mode`.
    ModeArg => RescueMode {
        /// Stable if the image asks for it, is a CD-ROM or is the server's own, else classic.
        Auto => Unspecified,
        /// The rescue disk is the first disk, the original root the second.
        Classic => Classic,
        /// Every disk keeps its place and name; the rescue disk comes last and boots first.
        Stable => Stable,
    }
}
values! {
    /// `--bus`.
    BusArg => RescueBus {
        /// virtio-blk.
        Virtio => Virtio,
        /// SCSI.
        Scsi => Scsi,
        /// USB.
        Usb => Usb,
        /// SATA.
        Sata => Sata,
        /// IDE.
        Ide => Ide,
    }
}
values! {
    /// `--device`.
    DeviceArg => RescueDevice {
        /// A hard disk.
        Disk => Disk,
        /// A CD-ROM drive with the image in it.
        Cdrom => Cdrom,
    }
}
values! {
    /// `--disks`.
    DisksArg => DiskProtection {
        /// Repairs go straight to the disks.
        ReadWrite => ReadWrite,
        /// Repairs go to overlays; `unrescue --overlay` commits or discards them.
        Overlay => Overlay,
        /// The disks cannot be written.
        ReadOnly => ReadOnly,
    }
}
values! {
    /// `--overlay`.
    OverlayArg => OverlayDisposition {
        /// Write the repairs to the disks.
        Commit => Commit,
        /// Throw the repairs away.
        Discard => Discard,
    }
}
values! {
    /// `--power`.
    PowerArg => UnrescuePower {
        /// Start the server, whatever it was before.
        Start => Start,
        /// As it was before the rescue.
        Restore => Restore,
    }
}
values! {
    /// `--on-timeout`.
    OnTimeoutArg => RebootOnTimeout {
        /// The guest is ended, and started again.
        Hard => Hard,
        /// The guest goes on, and the reboot fails.
        Fail => Fail,
    }
}
values! {
    /// `--firmware`.
    FirmwareArg => Firmware {
        /// SeaBIOS.
        Bios => Bios,
        /// OVMF.
        Uefi => Uefi,
    }
}
values! {
    /// `--format`.
    ImageFormatArg => ImageFormat {
        /// Raw disk.
        Raw => Raw,
        /// qcow2.
        Qcow2 => Qcow2,
        /// ISO 9660.
        Iso => Iso,
    }
}
values! {
    /// `--origin`.
    OriginArg => ServerOrigin {
        /// Made from an image.
        Created => Created,
        /// Taken over from libvirt.
        Adopted => Adopted,
    }
}
values! {
    /// The state of `reset-state`.
    ResetArg => VmState {
        /// Active; RESCUED while a rescue is in force.
        Active => Active,
        /// In error.
        Error => Error,
    }
}

/// `--clear`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClearArg {
    /// The description.
    Description,
    /// The metadata.
    Metadata,
    /// The tags.
    Tags,
    /// The IPv4 address.
    AccessIpv4,
    /// The IPv6 address.
    AccessIpv6,
    /// The time to shut down: the configured one applies.
    ShutdownTimeout,
    /// The place when servers are started again.
    AutostartOrder,
}

impl ClearArg {
    /// The field of the API.
    pub(crate) const fn field(self) -> &'static str {
        match self {
            Self::Description => "description",
            Self::Metadata => "metadata",
            Self::Tags => "tags",
            Self::AccessIpv4 => "access_ipv4",
            Self::AccessIpv6 => "access_ipv6",
            Self::ShutdownTimeout => "shutdown_timeout",
            Self::AutostartOrder => "autostart_order",
        }
    }
}

values! {
    /// `--power` of the list.
    PowerStateArg => PowerState {
        /// libvirt has no state for it.
        Nostate => Nostate,
        /// The guest runs.
        Running => Running,
        /// Its CPUs are stopped.
        Paused => Paused,
        /// It is off.
        Shutdown => Shutdown,
        /// It crashed.
        Crashed => Crashed,
        /// It put itself to sleep.
        Suspended => Suspended,
        /// libvirt could not be asked.
        Unknown => Unknown,
    }
}
values! {
    /// `--vm-state` of the list.
    VmStateArg => VmState {
        /// Being made.
        Building => Building,
        /// Should run.
        Active => Active,
        /// CPUs stopped.
        Paused => Paused,
        /// Memory saved to disk.
        Suspended => Suspended,
        /// Powered off.
        Stopped => Stopped,
        /// The rescue domain runs in its place.
        Rescued => Rescued,
        /// Waits for confirm or revert of a new size.
        Resized => Resized,
        /// Waits for reclaim or restore.
        SoftDeleted => SoftDeleted,
        /// Gone.
        Deleted => Deleted,
        /// An action failed, and its roll-back too.
        Error => Error,
        /// Its image is stored.
        Shelved => Shelved,
        /// Nothing of it is on any host.
        ShelvedOffloaded => ShelvedOffloaded,
    }
}

/// Reads `KEY=VALUE`.
///
/// # Errors
/// What is missing.
pub(crate) fn key_value(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some(("", _)) => Err("the key is empty; write KEY=VALUE"),
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err("there is no '='; write KEY=VALUE"),
    }
}

/// The network interfaces of a new server, in the order in which the arguments name them: the guest
/// counts them so.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interfaces(pub(crate) Vec<v1::NetworkInterfaceSpec>);

/// Makes a connection of the name that an argument begins with.
type Connect = fn(String) -> Connection;

/// The arguments, and what their names become.
const CONNECTIONS: [(&str, Connect); 3] = [
    ("network", Connection::Network),
    ("bridge", Connection::Bridge),
    ("user-network", |_| Connection::User(true)),
];

/// Reads `NAME[,mac=MAC][,model=MODEL]`; the name is empty for a user network.
fn interface(
    text: &str,
    named: bool,
    connection: Connect,
) -> Result<v1::NetworkInterfaceSpec, String> {
    let mut parts = text.split(',');
    let name = if named {
        parts.next().unwrap_or_default()
    } else {
        ""
    };
    if named && (name.is_empty() || name.contains('=')) {
        return Err("it must begin with a name; write NAME[,mac=MAC][,model=MODEL]".to_owned());
    }
    let mut spec = v1::NetworkInterfaceSpec {
        connection: Some(connection(name.to_owned())),
        ..Default::default()
    };
    for part in parts.filter(|part| named || !part.is_empty()) {
        match part.split_once('=') {
            Some(("mac", mac)) => spec.mac = mac.to_owned(),
            Some(("model", model)) => spec.model = model.to_owned(),
            _ => return Err(format!("'{part}' is neither mac=MAC nor model=MODEL")),
        }
    }
    Ok(spec)
}

impl Args for Interfaces {
    fn augment_args(command: Command) -> Command {
        let argument = |name: &'static str| {
            Arg::new(name)
                .long(name)
                .action(ArgAction::Append)
                .value_name("NAME[,mac=MAC][,model=MODEL]")
        };
        command
            .arg(
                argument("network")
                    .help("Interface on a network of libvirt. Can be given more than once"),
            )
            .arg(
                argument("bridge")
                    .help("Interface on a bridge of the host. Can be given more than once"),
            )
            .arg(
                argument("user-network")
                    .value_name("mac=MAC,model=MODEL")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("")
                    .help("Interface on QEMU's user-mode network: outgoing connections only"),
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Interfaces {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Vec::new();
        for (argument, connection) in CONNECTIONS {
            let values = matches.get_many::<String>(argument).into_iter().flatten();
            let places = matches.indices_of(argument).into_iter().flatten();
            for (place, value) in places.zip(values) {
                let spec =
                    interface(value, argument != "user-network", connection).map_err(|why| {
                        let why = format!("invalid value '{value}' for '--{argument}': {why}\n");
                        clap::Error::raw(ErrorKind::ValueValidation, why)
                    })?;
                found.push((place, spec));
            }
        }
        found.sort_by_key(|(place, _)| *place);
        Ok(Self(found.into_iter().map(|(_, spec)| spec).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Interfaces, clap::Error> {
        let command = Interfaces::augment_args(Command::new("t").no_binary_name(true));
        Interfaces::from_arg_matches(&command.try_get_matches_from(arguments)?)
    }

    #[test]
    fn interfaces_keep_the_order_of_the_arguments() {
        let found = parsed(&[
            "--bridge",
            "br0,mac=52:54:00:00:00:01",
            "--network",
            "default,model=e1000",
            "--user-network",
            "--bridge=br1",
            "--user-network=model=e1000",
        ])
        .unwrap();
        let shown: Vec<_> = found
            .0
            .iter()
            .map(|spec| {
                (
                    spec.connection.clone().unwrap(),
                    spec.mac.as_str(),
                    spec.model.as_str(),
                )
            })
            .collect();
        assert_eq!(
            shown,
            [
                (Connection::Bridge("br0".into()), "52:54:00:00:00:01", ""),
                (Connection::Network("default".into()), "", "e1000"),
                (Connection::User(true), "", ""),
                (Connection::Bridge("br1".into()), "", ""),
                (Connection::User(true), "", "e1000"),
            ]
        );
    }

    #[test]
    fn an_interface_without_a_name_or_with_unknown_parts_is_refused() {
        for arguments in [
            ["--bridge", "mac=1"],
            ["--bridge", ""],
            ["--network", "a,b=c"],
        ] {
            let refused = parsed(&arguments).unwrap_err();
            assert_eq!(refused.exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn a_value_may_hold_what_separates_it_from_its_key() {
        assert_eq!(key_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(key_value("a="), Ok(("a".to_owned(), String::new())));
        assert!(key_value("=b").is_err());
        assert!(key_value("ab").is_err());
    }
}
