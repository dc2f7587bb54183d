// SPDX-License-Identifier: Apache-2.0
//! What goes wrong meanwhile: the agent and libvirtd are killed and started again, as systemd would, QEMUs
//! are killed, and somebody uses libvirt beside the agent.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use uuid::Uuid;
use virt::domain::Domain;

use super::tally::{Disturbance, Tally};
use crate::agent::TestAgent;
use crate::host::TestHost;
use crate::libvirt::Libvirt;
use crate::wait::SOON;

/// The longest that a daemon is away: systemd starts one again after 100 ms or what its unit says.
const AWAY: u64 = 2_500;

/// How often it is told how things are.
const TELL: Duration = Duration::from_secs(5);

/// The servers as they are now, one for each life.
pub(super) type Now = Arc<Mutex<Vec<Uuid>>>;

/// Somebody who means no good.
pub(super) struct Chaos<'a, 'h> {
    pub(super) host: &'h TestHost,
    pub(super) agent: &'a mut TestAgent<'h>,
    pub(super) libvirt: Libvirt,
    pub(super) now: Now,
    pub(super) tally: Tally,
    pub(super) random: StdRng,
}

impl Chaos<'_, '_> {
    /// Does harm until `end`; from `spare_agent` on the agent is left alive.
    pub(super) async fn reign(&mut self, begin: Instant, spare_agent: Instant, end: Instant) {
        let mut told = begin;
        while Instant::now() < end {
            let pause = Duration::from_millis(self.random.random_range(1_000..6_000));
            let pause = pause.min(end.saturating_duration_since(Instant::now()));
            // The time between two blows; the verbs go on meanwhile.
            tokio::time::sleep(pause).await;
            if let Some(how) = self.agent.ended() {
                self.tally.defect(format!("the agent ended with {how}"));
                self.agent.forget_process();
                self.agent.restart().await;
            }
            if Instant::now() < end {
                self.strike(Instant::now() < spare_agent).await;
            }
            if told.elapsed() >= TELL {
                told = Instant::now();
                println!(
                    "{:>5} s: {}",
                    begin.elapsed().as_secs(),
                    self.tally.progress()
                );
            }
        }
    }

    async fn strike(&mut self, agent_too: bool) {
        match self.random.random_range(0..100) {
            0..30 if agent_too => {
                let number = self.tally.disturb(Disturbance::AgentKilled);
                self.agent.kill_9();
                self.pause().await;
                self.agent.restart().await;
                self.tally.disturbed(number);
            }
            30..35 if agent_too => {
                let number = self.tally.disturb(Disturbance::AgentStopped);
                let how = self.agent.sigterm_and_wait(SOON);
                if how != "exit 0" {
                    self.tally
                        .defect(format!("asked to stop, the agent ended with {how}"));
                }
                self.agent.restart().await;
                self.tally.disturbed(number);
            }
            35..45 if agent_too => self.kill_both().await,
            30..65 => {
                let number = self.tally.disturb(Disturbance::LibvirtdKilled);
                self.host.kill_libvirtd();
                self.pause().await;
                self.host.start_libvirtd();
                self.agent.wait_linked().await;
                self.tally.disturbed(number);
            }
            65..77 => self.kill_qemu(),
            _ => self.meddle(),
        }
    }

    /// Both die; either may be back first.
    async fn kill_both(&mut self) {
        let agent = self.tally.disturb(Disturbance::AgentKilled);
        let libvirtd = self.tally.disturb(Disturbance::LibvirtdKilled);
        if self.random.random() {
            self.agent.kill_9();
            self.host.kill_libvirtd();
            self.pause().await;
            self.host.start_libvirtd();
            self.pause().await;
            self.agent.restart().await;
        } else {
            self.host.kill_libvirtd();
            self.agent.kill_9();
            self.pause().await;
            self.agent.spawn();
            self.agent.wait_serving().await;
            self.pause().await;
            self.host.start_libvirtd();
            self.agent.wait_linked().await;
        }
        self.tally.disturbed(libvirtd);
        self.tally.disturbed(agent);
    }

    async fn pause(&mut self) {
        let away = Duration::from_millis(self.random.random_range(0..AWAY));
        tokio::time::sleep(away).await;
    }

    fn victim(&mut self) -> Option<Uuid> {
        let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        now.choose(&mut self.random).copied()
    }

    fn kill_qemu(&mut self) {
        if let Some(id) = self.victim() {
            let number = self.tally.disturb(Disturbance::QemuKilled(id));
            // It may be off.
            self.host.try_kill_qemu(id);
            self.tally.disturbed(number);
        }
    }

    /// Somebody with virsh. What cannot be done just now is not done.
    fn meddle(&mut self) {
        type Call = fn(&Domain) -> Result<(), virt::error::Error>;
        let calls: [(&str, Call); 6] = [
            ("start", Domain::create),
            ("destroy", Domain::destroy),
            ("shutdown", |domain| domain.shutdown().map(drop)),
            ("suspend", Domain::suspend),
            ("resume", |domain| domain.resume()),
            ("managedsave", |domain| domain.managed_save(0).map(drop)),
        ];
        let call = calls.choose(&mut self.random).copied();
        if let (Some(id), Some((what, call))) = (self.victim(), call) {
            let number = self.tally.disturb(Disturbance::Outside(id, what));
            let _ = self
                .libvirt
                .domain(id, move |domain| call(domain).map(drop));
            self.tally.disturbed(number);
        }
    }
}
