// SPDX-License-Identifier: Apache-2.0
//! libvirt domain XML: reading it without losing anything, and rendering Salvor's domains from templates.
//!
//! Everything here is pure: text in, text out. The crate opens no file, asks no libvirt, and knows no server record.
//!
//! * [`Domain`] reads a definition and answers questions about it.
//! * [`render_server`] lays out the domain of a server that Salvor made.
//! * [`render_rescue`] turns a server's own definition into that of its rescue, keeping all it does not understand.
//! * [`without_secrets`] makes a definition fit to be shown.
//! * [`Templates`] holds the layouts, which an operator may replace.
//! * [`fixtures`] are domains to try them on.
//! * [`xml`] is the small document tree below all this.

mod console;
mod disk;
mod domain;
pub mod fixtures;
mod image;
mod place;
mod protect;
mod rename;
mod rescue;
mod same;
mod secrets;
mod server;
mod spec;
mod templates;
pub mod xml;

pub use console::ConsoleLog;
pub use disk::{Bus, Disk, DiskDevice, DiskSource};
pub use domain::{
    Domain, DomainError, Firmware, Interface, MARK_NAMESPACE, MachineFamily, Mark, Role,
};
pub use image::BaseImage;
pub use place::PlaceError;
pub use rename::renamed;
pub use rescue::{TemplateError, render_rescue};
pub use same::{in_order, same_definition};
pub use secrets::without_secrets;
pub use server::{
    DomainKind, NicSource, NicSpec, ServerDisk, ServerFirmware, ServerSpec, render_server,
};
pub use spec::{
    CONFIG_DRIVE_SERIAL, Device, DiskChange, DiskFormat, DiskRole, Mode, PlacedDisk, RESCUE_SERIAL,
    RescueDisk, RescueRendering, RescueSpec,
};
pub use templates::{LayoutError, TemplateName, Templates, TemplatesError};
