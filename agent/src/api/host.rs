// SPDX-License-Identifier: Apache-2.0
//! HostService: this host, and how the agent stands with libvirt. It answers while libvirt is away:
//! then with what was known last, and without versions.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use salvor_proto::v1::{
    self, GetHostRequest, GetHostResponse, ListUnmanagedDomainsRequest,
    ListUnmanagedDomainsResponse, host_service_server::HostService,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{
    Api,
    convert::{
        states::Wire as _,
        time::{duration, timestamp},
    },
    edge::Call,
    validate::Checked,
};
use crate::{
    core::{autostart::ComebackState, reason::Refusal},
    engine::now_ms,
    hypervisor::{HostFacts, Hypervisor, LinkState, StuckCall},
    storage::apart,
};

/// GetHost waits so long for libvirt, then answers without it.
const LIBVIRT: Duration = Duration::from_secs(2);

/// So many notes about servers that come back are shown.
const NOTES: usize = 100;

/// What is known of the host besides what can be asked.
pub(super) struct Known {
    /// The state of the link and since when, in milliseconds since the Unix epoch.
    link: watch::Receiver<(LinkState, i64)>,
    /// What libvirt said last.
    facts: Mutex<Option<HostFacts>>,
    started_at_ms: i64,
}

impl Known {
    /// Begins to follow the link. Needs a runtime.
    pub(super) fn follow(hypervisor: &Arc<dyn Hypervisor>) -> Self {
        let mut from = hypervisor.link();
        let now = now_ms();
        let (sender, link) = watch::channel((from.borrow_and_update().clone(), now));
        tokio::spawn(async move {
            loop {
                let changed = tokio::select! {
                    changed = from.changed() => changed.is_ok(),
                    () = sender.closed() => false,
                };
                if !changed {
                    return;
                }
                let state = from.borrow_and_update().clone();
                sender.send_modify(|(last, since)| {
                    // Another reason for being down is not another outage.
                    if (*last == LinkState::Up) != (state == LinkState::Up) {
                        *since = now_ms();
                    }
                    *last = state;
                });
            }
        });
        Self {
            link,
            facts: Mutex::new(None),
            started_at_ms: now,
        }
    }
}

/// Calls that were given up on.
pub(super) fn stuck_calls(calls: &[StuckCall]) -> Vec<v1::StuckCall> {
    let told = calls.iter().map(|stuck| v1::StuckCall {
        call: stuck.call.to_owned(),
        domain_id: stuck.domain.map(|id| id.to_string()).unwrap_or_default(),
        age: Some(duration(stuck.age)),
    });
    told.collect()
}

impl Api {
    /// What libvirt says of the host, and whether it says so now.
    async fn facts(&self, up: bool) -> (Option<HostFacts>, bool) {
        let fresh = match up {
            true => tokio::time::timeout(LIBVIRT, self.hypervisor.host()).await,
            false => return (self.last_facts(), false),
        };
        if let Ok(Ok(facts)) = fresh {
            *self
                .known
                .facts
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(facts.clone());
            return (Some(facts), true);
        }
        (self.last_facts(), false)
    }

    fn last_facts(&self) -> Option<HostFacts> {
        self.known
            .facts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    async fn host(&self) -> v1::Host {
        let (link, since) = self.known.link.borrow().clone();
        let (facts, fresh) = self.facts(link == LinkState::Up).await;
        let (disk_total_bytes, disk_free_bytes) = self.space().await;
        let autostart = self.autostart().await;
        let of = |pick: fn(&HostFacts) -> String| facts.as_ref().map(pick);
        let version =
            |pick: fn(&HostFacts) -> String| of(pick).filter(|_| fresh).unwrap_or_default();
        let local_cpus = || {
            std::thread::available_parallelism()
                .map_or(0, |count| u32::try_from(count.get()).unwrap_or(0))
        };
        v1::Host {
            id: self.store.host_id().to_string(),
            hostname: of(|facts| facts.hostname.clone())
                .or_else(|| nix::unistd::gethostname().ok()?.into_string().ok())
                .unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.host.boot_id.clone(),
            arch: of(|facts| facts.arch.clone())
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            libvirt_version: version(|facts| facts.libvirt_version.clone()),
            hypervisor_version: version(|facts| facts.hypervisor_version.clone()),
            virt_type: self.dispatcher.settings().virt_type.clone(),
            cpus: facts.as_ref().map_or_else(local_cpus, |facts| facts.cpus),
            memory_mib: facts.as_ref().map_or(0, |facts| facts.memory_kib / 1024),
            disk_total_bytes,
            disk_free_bytes,
            libvirt: Some(v1::LibvirtLink {
                up: link == LinkState::Up,
                since: Some(timestamp(since)),
                reason: match link {
                    LinkState::Up => String::new(),
                    LinkState::Down { reason } => reason,
                },
                uri: self.host.libvirt_uri.clone(),
            }),
            stuck_calls: stuck_calls(&self.hypervisor.stuck_calls()),
            servers: u32::try_from(self.store.server_count()).unwrap_or(u32::MAX),
            running_operations: u32::try_from(self.engine.under_way()).unwrap_or(u32::MAX),
            revision: *self.store.revision().borrow(),
            start_time: Some(timestamp(self.known.started_at_ms)),
            autostart,
        }
    }

    /// How far servers have come back; `None` if none is to.
    async fn autostart(&self) -> Option<v1::Autostart> {
        let all = match self.store.comebacks().await {
            Ok(all) if !all.is_empty() => all,
            Ok(_) => return None,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "which servers are to come back cannot be read"
                );
                return None;
            }
        };
        let count = |state| {
            let many = all.iter().filter(|comeback| comeback.state == state);
            u32::try_from(many.count()).unwrap_or(u32::MAX)
        };
        Some(v1::Autostart {
            waiting: count(ComebackState::Waiting),
            started: count(ComebackState::Started),
            left_alone: count(ComebackState::LeftAlone),
            failed: count(ComebackState::Failed),
            notes: all
                .iter()
                .filter(|comeback| !comeback.message.is_empty())
                .take(NOTES)
                .map(|comeback| v1::AutostartNote {
                    server_id: comeback.server.to_string(),
                    state: comeback.state.name().to_owned(),
                    message: comeback.message.clone(),
                })
                .collect(),
        })
    }

    /// Size and free bytes of the filesystem of the state folder; zeros if it cannot be asked.
    async fn space(&self) -> (u64, u64) {
        let state_dir = self.dispatcher.settings().layout.state_dir().to_owned();
        let asked = apart::look("host", move || {
            nix::sys::statvfs::statvfs(Path::new(&state_dir))
        });
        match asked.await {
            Ok(Ok(stat)) => (
                stat.blocks().saturating_mul(stat.fragment_size()),
                stat.blocks_available().saturating_mul(stat.fragment_size()),
            ),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the free space of the state folder cannot be told");
                (0, 0)
            }
            Err(error) => {
                tracing::warn!(%error, "the free space of the state folder cannot be told");
                (0, 0)
            }
        }
    }

    async fn unmanaged(&self) -> Checked<Vec<v1::UnmanagedDomain>> {
        let domains = self.hypervisor.domains().await.map_err(Refusal::from)?;
        let servers: HashSet<_> = self
            .store
            .servers_after(i64::MIN)
            .into_iter()
            .map(|(_, server)| server.id)
            .collect();
        let mut unmanaged: Vec<_> = domains
            .into_iter()
            .filter(|domain| !servers.contains(&domain.id))
            .map(|domain| v1::UnmanagedDomain {
                id: domain.id.to_string(),
                name: domain.name,
                power_state: domain.power.wire(),
                persistent: domain.persistent,
            })
            .collect();
        unmanaged.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| a.id.cmp(&b.id)));
        Ok(unmanaged)
    }
}

#[tonic::async_trait]
impl HostService for Api {
    async fn get_host(
        &self,
        request: Request<GetHostRequest>,
    ) -> Result<Response<GetHostResponse>, Status> {
        Call::open(request)?;
        let host = Some(self.host().await);
        Ok(Response::new(GetHostResponse { host }))
    }

    async fn list_unmanaged_domains(
        &self,
        request: Request<ListUnmanagedDomainsRequest>,
    ) -> Result<Response<ListUnmanagedDomainsResponse>, Status> {
        let (call, _) = Call::open(request)?;
        let domains = self.unmanaged().await;
        domains
            .map(|domains| Response::new(ListUnmanagedDomainsResponse { domains }))
            .map_err(|refusal| call.refuse(&refusal))
    }
}
