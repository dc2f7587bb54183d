// SPDX-License-Identifier: Apache-2.0
//! Who is measured: raw libvirt calls from this process, and the agent over its socket. Each has a guest
//! of its own, and both guests are alike.

use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use salvor_proto::v1::{RescueServerRequest, UnrescueServerRequest};
use tokio::runtime::Runtime;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys;

use super::process;
use crate::client::{Client, Plain};
use crate::tool;
use crate::wait::SOON;

/// One who does what is measured. Every call returns when it is done, and panics if it fails.
pub trait Peer {
    /// The domain that it works on.
    fn domain(&self) -> Uuid;

    /// CPU time that it has taken so far, its ended children's included.
    fn cpu(&self) -> Duration;

    /// Starts the guest.
    fn start(&mut self);

    /// Pulls the guest's plug.
    fn stop(&mut self);

    /// Presses the guest's power button and waits until it is off.
    fn shut_down(&mut self);

    /// Pulls the guest's plug and boots a rescue disk in its place.
    fn rescue(&mut self);

    /// Pulls the rescue guest's plug and boots the guest as it was before.
    fn unrescue(&mut self);

    /// Stops the guest's CPUs.
    fn pause(&mut self);

    /// Lets them run again.
    fn unpause(&mut self);

    /// Saves the guest's memory and ends it.
    fn suspend(&mut self);

    /// Starts the guest from its saved memory.
    fn resume(&mut self);

    /// Pulls the guest's plug and starts it.
    fn hard_reboot(&mut self);
}

/// The least sequence of libvirt calls that does it, over one connection, handles kept: what a program
/// made for nothing else would do. It keeps no record, syncs nothing and checks nothing.
#[derive(Debug)]
pub struct Raw {
    domain: Domain,
    connection: Connect,
    rescue: RescueParts,
}

/// What [`Raw`] needs to rescue. Made before anything is measured.
#[derive(Debug)]
pub struct RescueParts {
    /// The guest's own definition.
    pub original_xml: String,
    /// The definition that takes its place.
    pub rescue_xml: String,
    /// Where the rescue disk is to be made.
    pub overlay: PathBuf,
    /// The image that it stands on, a qcow2 file.
    pub base: PathBuf,
    /// The size of the disk in bytes.
    pub size: u64,
}

impl Raw {
    /// Works on the domain `id`.
    pub fn new(connection: Connect, id: Uuid, rescue: RescueParts) -> Self {
        Self {
            domain: connection.lookup_domain_by_uuid(id).unwrap(),
            connection,
            rescue,
        }
    }

    /// The domain's state, looked up by uuid.
    pub fn get(&self, id: Uuid) {
        let domain = self.connection.lookup_domain_by_uuid(id).unwrap();
        domain.info().unwrap();
    }
}

impl Peer for Raw {
    fn domain(&self) -> Uuid {
        self.domain.uuid().unwrap()
    }

    fn cpu(&self) -> Duration {
        process::own_cpu()
    }

    fn start(&mut self) {
        self.domain.create().unwrap();
    }

    fn stop(&mut self) {
        self.domain.destroy().unwrap();
    }

    fn shut_down(&mut self) {
        self.domain
            .shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            .unwrap();
        let deadline = Instant::now() + SOON;
        while self.domain.is_active().unwrap() {
            assert!(Instant::now() < deadline, "the guest does not shut down");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn rescue(&mut self) {
        let parts = &self.rescue;
        // With -u and a size the base is not opened.
        let options = ["-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
        tool!(
            "qemu-img",
            "create",
            options[0],
            options[1],
            options[2],
            options[3],
            options[4],
            options[5],
            options[6],
            parts.base,
            parts.overlay,
            parts.size.to_string()
        );
        self.domain.destroy().unwrap();
        self.domain = self
            .connection
            .define_domain_xml(&parts.rescue_xml)
            .unwrap();
        self.domain.create().unwrap();
    }

    fn unrescue(&mut self) {
        let parts = &self.rescue;
        self.domain.destroy().unwrap();
        self.domain = self
            .connection
            .define_domain_xml(&parts.original_xml)
            .unwrap();
        self.domain.create().unwrap();
        fs::remove_file(&parts.overlay).unwrap();
    }

    fn pause(&mut self) {
        self.domain.suspend().unwrap();
    }

    fn unpause(&mut self) {
        self.domain.resume().unwrap();
    }

    fn suspend(&mut self) {
        self.domain.managed_save(0).unwrap();
    }

    fn resume(&mut self) {
        self.domain.create().unwrap();
    }

    fn hard_reboot(&mut self) {
        self.domain.destroy().unwrap();
        self.domain.create().unwrap();
    }
}

/// The agent: a call that begins the action and one that waits for its end.
#[derive(Debug)]
pub struct Agent {
    /// Where this side of its calls runs.
    pub runtime: Rc<Runtime>,
    /// A client of it.
    pub client: Client,
    /// Its process.
    pub pid: u32,
    /// The server.
    pub server: Uuid,
    /// The rescue image.
    pub image: String,
}

impl Agent {
    fn act(&mut self, verb: Plain) {
        let ended = self.client.act(verb, self.server);
        self.runtime.block_on(ended).done();
    }
}

impl Peer for Agent {
    fn domain(&self) -> Uuid {
        self.server
    }

    fn cpu(&self) -> Duration {
        process::cpu(self.pid)
    }

    fn start(&mut self) {
        let ended = self.runtime.block_on(self.client.start(self.server));
        ended.done();
    }

    fn stop(&mut self) {
        let stopped = self.client.stop(self.server, Some(Duration::ZERO));
        self.runtime.block_on(stopped).done();
    }

    fn shut_down(&mut self) {
        let stopped = self.client.stop(self.server, Some(SOON));
        self.runtime.block_on(stopped).done();
    }

    fn rescue(&mut self) {
        let request = RescueServerRequest {
            server: self.server.to_string(),
            image: Some(self.image.clone()),
            shutdown_timeout: Some(Duration::ZERO.try_into().unwrap()),
            ..RescueServerRequest::default()
        };
        let (_, ended) = self.runtime.block_on(self.client.rescue(request));
        ended.done();
    }

    fn unrescue(&mut self) {
        let request = UnrescueServerRequest {
            server: self.server.to_string(),
            shutdown_timeout: Some(Duration::ZERO.try_into().unwrap()),
            ..UnrescueServerRequest::default()
        };
        self.runtime.block_on(self.client.unrescue(request)).done();
    }

    fn pause(&mut self) {
        self.act(Plain::Pause);
    }

    fn unpause(&mut self) {
        self.act(Plain::Unpause);
    }

    fn suspend(&mut self) {
        self.act(Plain::Suspend);
    }

    fn resume(&mut self) {
        self.act(Plain::Resume);
    }

    fn hard_reboot(&mut self) {
        self.act(Plain::HardReboot);
    }
}
