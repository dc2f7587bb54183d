// SPDX-License-Identifier: Apache-2.0
//! Whatever is put into any field: an answer, no panic, and no change.

use salvor_proto::{google::longrunning, v1};
use tonic::{Code, Status};

use crate::harness::Agent;

fn hostile() -> Vec<String> {
    let mut texts: Vec<String> = [
        "\0",
        "a\0b",
        "a\nb",
        "\r\n\r\nHTTP/1.1 200 OK",
        "\u{1b}[2J\u{1b}[31m",
        "\u{202e}gnirts",
        "../../../etc/shadow",
        "/dev/sda",
        "</name><devices><disk/></devices>",
        "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>&e;",
        "'\"`$(reboot);|&",
        "' OR 1=1 --",
        "%s%n%x",
        "-drive file=/etc/shadow",
        "{{ 7*7 }}",
        "ffffffff",
        "00000000-0000-0000-0000-000000000000",
        "\u{10ffff}",
        " ",
        "",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push("A".repeat(1_000_000));
    texts.push("é\0".repeat(300_000));
    texts.push("x".repeat(5_000_000));
    texts
}

/// An answer that is an error a caller can do something with, and small.
fn check(what: &str, answer: Result<(), Status>) {
    let Err(status) = answer else { return };
    assert!(
        matches!(
            status.code(),
            Code::InvalidArgument
                | Code::NotFound
                | Code::FailedPrecondition
                | Code::AlreadyExists
                | Code::OutOfRange
        ),
        "{what}: {status:?}"
    );
    assert!(status.message().len() < 2_000, "{what}");
    assert!(
        !status.message().chars().any(char::is_control),
        "{what}: {status:?}"
    );
}

#[tokio::test]
async fn no_text_in_any_field_does_harm() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    agent.image("cirros").await;
    let before = agent.get("web").await.unwrap();
    let server = || id.to_string();
    let flavor = || {
        Some(v1::Flavor {
            vcpus: 1,
            memory_mib: 64,
            disk_gib: 0,
        })
    };
    for text in hostile() {
        let what: String = text
            .chars()
            .take(20)
            .flat_map(char::escape_default)
            .collect();
        let t = || text.clone();
        let mut servers = agent.servers().max_encoding_message_size(usize::MAX);
        macro_rules! try_all {
            ($client:expr; $($method:ident($request:expr)),+ $(,)?) => {
                $(check(
                    &format!("{} {what}", stringify!($method)),
                    $client.$method($request).await.map(|_| ()),
                );)+
            };
        }
        macro_rules! with {
            ($message:ident { $($field:ident: $value:expr),* }) => {
                v1::$message { $($field: $value,)* ..Default::default() }
            };
        }
        // Create must not succeed here: each of these has something wrong.
        let base = || {
            with!(CreateServerRequest {
                name: "n".to_owned(),
                image: "none".to_owned(),
                flavor: flavor()
            })
        };
        try_all!(servers;
            get_server(with!(GetServerRequest { server: t() })),
            create_server(v1::CreateServerRequest { request_id: t(), ..base() }),
            create_server(v1::CreateServerRequest { server_id: t(), ..base() }),
            create_server(v1::CreateServerRequest { name: t(), ..base() }),
            create_server(v1::CreateServerRequest { image: t(), ..base() }),
            create_server(v1::CreateServerRequest { hostname: t(), ..base() }),
            create_server(v1::CreateServerRequest { machine: t(), ..base() }),
            create_server(v1::CreateServerRequest { admin_pass: Some(t()), ..base() }),
            create_server(v1::CreateServerRequest { user_data: text.clone().into_bytes(), ..base() }),
            create_server(v1::CreateServerRequest { metadata: [(t(), t())].into(), ..base() }),
            create_server(v1::CreateServerRequest { public_keys: [(t(), t())].into(), ..base() }),
            create_server(v1::CreateServerRequest {
                interfaces: vec![v1::NetworkInterfaceSpec {
                    connection: Some(v1::network_interface_spec::Connection::Bridge(t())),
                    mac: t(),
                    model: t(),
                }],
                ..base()
            }),
            adopt_server(with!(AdoptServerRequest { domain: t() })),
            adopt_server(with!(AdoptServerRequest { domain: "web".to_owned(), name: t() })),
            release_server(with!(ReleaseServerRequest { server: t() })),
            delete_server(with!(DeleteServerRequest { server: t() })),
            start_server(with!(StartServerRequest { server: server(), request_id: t() })),
            stop_server(with!(StopServerRequest { server: t() })),
            rescue_server(with!(RescueServerRequest { server: t() })),
            rescue_server(with!(RescueServerRequest { server: server(), image: Some(t()) })),
            rescue_server(with!(RescueServerRequest { server: server(), admin_pass: Some(t()) })),
            unrescue_server(with!(UnrescueServerRequest { server: t() })),
            lock_server(with!(LockServerRequest { server: t() })),
            lock_server(with!(LockServerRequest { server: "none".to_owned(), reason: Some(t()) })),
            unlock_server(with!(UnlockServerRequest { server: t() })),
            update_server(with!(UpdateServerRequest {
                server: server(),
                update_mask: Some(prost_types::FieldMask { paths: vec![t()] })
            })),
            update_server(with!(UpdateServerRequest {
                server: "none".to_owned(),
                name: t(),
                update_mask: Some(prost_types::FieldMask { paths: vec!["name".to_owned()] })
            })),
            update_server(with!(UpdateServerRequest {
                server: "none".to_owned(),
                tags: vec![t()],
                update_mask: Some(prost_types::FieldMask { paths: vec!["tags".to_owned()] })
            })),
            reset_server_state(with!(ResetServerStateRequest { server: t() })),
            restore_server(with!(RestoreServerRequest { server: t() })),
            force_delete_server(with!(ForceDeleteServerRequest { server: t() })),
            accept_server_drift(with!(AcceptServerDriftRequest { server: t() })),
            restore_server_definition(with!(RestoreServerDefinitionRequest { server: t() })),
            get_server_drift(with!(GetServerDriftRequest { server: t() })),
            abandon_operation(with!(AbandonOperationRequest { name: t() })),
            list_servers(with!(ListServersRequest { tags: vec![t()] })),
            list_servers(with!(ListServersRequest { project_id: t() })),
            list_servers(with!(ListServersRequest { page_token: t() })),
            list_servers(with!(ListServersRequest { name_contains: t() })),
            list_servers(with!(ListServersRequest { statuses: vec![t()] })),
            plan_action(v1::PlanActionRequest {
                action: Some(v1::plan_action_request::Action::Rescue(with!(RescueServerRequest {
                    server: t(), image: Some(t())
                })))
            }),
        );
        let mut operations = agent.operations().max_encoding_message_size(usize::MAX);
        try_all!(operations;
            get_operation(longrunning::GetOperationRequest { name: t() }),
            wait_operation(longrunning::WaitOperationRequest { name: t(), timeout: None }),
            cancel_operation(longrunning::CancelOperationRequest { name: t() }),
            list_operations(longrunning::ListOperationsRequest { filter: t(), ..Default::default() }),
            list_operations(longrunning::ListOperationsRequest { page_token: t(), ..Default::default() }),
            list_operations(longrunning::ListOperationsRequest { name: t(), ..Default::default() }),
        );
        let mut images = agent.images().max_encoding_message_size(usize::MAX);
        try_all!(images;
            get_image(v1::GetImageRequest { image: t() }),
            list_images(v1::ListImagesRequest { page_token: t(), ..Default::default() }),
            import_image_from_path(v1::ImportImageFromPathRequest {
                spec: Some(v1::ImageSpec { name: "n".to_owned(), ..Default::default() }),
                path: t(),
                request_id: String::new(),
            }),
            import_image(tokio_stream::once(v1::ImportImageRequest {
                part: Some(v1::import_image_request::Part::Spec(v1::ImageSpec {
                    id: t(), name: t(), sha256: t(), properties: [(t(), t())].into(), ..Default::default()
                })),
                request_id: t(),
            })),
        );
        if text != "cirros" {
            try_all!(images; delete_image(v1::DeleteImageRequest { image: t(), ..Default::default() }));
        }
        let mut consoles = agent.consoles().max_encoding_message_size(usize::MAX);
        let cursor = || Some(v1::get_console_log_request::From::Cursor(t()));
        try_all!(consoles;
            get_console_log(with!(GetConsoleLogRequest { server: t() })),
            get_console_log(with!(GetConsoleLogRequest { server: server(), from: cursor() })),
            follow_console_log(with!(FollowConsoleLogRequest { server: t() })),
            get_screenshot(with!(GetScreenshotRequest { server: t() })),
            attach_console(tokio_stream::once(v1::AttachConsoleRequest {
                item: Some(v1::attach_console_request::Item::Open(v1::ConsoleOpen {
                    server: t(), force: true, ..Default::default()
                })),
            })),
            attach_console(tokio_stream::once(v1::AttachConsoleRequest {
                item: Some(v1::attach_console_request::Item::Input(t().into_bytes())),
            })),
        );
        try_all!(servers;
            get_server_diagnostics(with!(GetServerDiagnosticsRequest { server: t() })),
        );
        let mut watch = agent.watch().max_encoding_message_size(usize::MAX);
        try_all!(watch; watch_events(v1::WatchEventsRequest { after_revision: None, servers: vec![t()] }));
    }
    let after = agent.get("web").await.unwrap();
    assert_eq!(after, before);
    assert_eq!(agent.store.server_count(), 1);
    assert_eq!(agent.store.images().await.unwrap().len(), 1);
}

#[tokio::test]
async fn no_number_in_any_field_does_harm() {
    let agent = Agent::start().await;
    let id = agent.server("web").await.to_string();
    let before = agent.get("web").await.unwrap();
    for number in [i32::MIN, -1, 99, i32::MAX] {
        let seconds = Some(prost_types::Duration {
            seconds: i64::from(number) * i64::from(i32::MAX),
            nanos: number,
        });
        let rescue = |change: fn(&mut v1::RescueServerRequest, i32)| {
            let mut request = v1::RescueServerRequest {
                server: id.clone(),
                ..v1::RescueServerRequest::default()
            };
            change(&mut request, number);
            request
        };
        let mut client = agent.servers();
        for request in [
            rescue(|request, number| request.mode = number),
            rescue(|request, number| request.bus = number),
            rescue(|request, number| request.device = number),
            rescue(|request, number| request.disk_protection = number),
            v1::RescueServerRequest {
                timeout: seconds,
                ..rescue(|_, _| ())
            },
            v1::RescueServerRequest {
                shutdown_timeout: seconds,
                ..rescue(|_, _| ())
            },
        ] {
            let status = client.rescue_server(request).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        }
        let stop = v1::StopServerRequest {
            server: id.clone(),
            shutdown_timeout: seconds,
            ..v1::StopServerRequest::default()
        };
        assert_eq!(
            client.stop_server(stop).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        let lock = v1::LockServerRequest {
            server: id.clone(),
            expires_in: seconds,
            ..v1::LockServerRequest::default()
        };
        assert_eq!(
            client.lock_server(lock).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        let update = v1::UpdateServerRequest {
            server: id.clone(),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["shutdown_timeout".to_owned()],
            }),
            shutdown_timeout: seconds,
            ..v1::UpdateServerRequest::default()
        };
        assert_eq!(
            client.update_server(update).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        let reset = v1::ResetServerStateRequest {
            server: id.clone(),
            state: number,
            ..v1::ResetServerStateRequest::default()
        };
        assert_eq!(
            client.reset_server_state(reset).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        let unrescue = v1::UnrescueServerRequest {
            server: id.clone(),
            overlay: number,
            power: number,
            ..v1::UnrescueServerRequest::default()
        };
        assert_eq!(
            client.unrescue_server(unrescue).await.unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    assert_eq!(agent.get("web").await.unwrap(), before);
}
