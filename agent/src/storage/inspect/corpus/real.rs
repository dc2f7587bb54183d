// SPDX-License-Identifier: Apache-2.0
//! Images made by qemu-img: good ones pass, cut ones and foreign ones do not.

use std::path::Path;
use std::process::Command;

use super::*;

/// Runs a tool of the host that the tests need; its absence is a failure, not a reason to skip.
fn run(program: &str, arguments: &[&str], path: &Path) {
    let output = Command::new(program)
        .args(arguments)
        .arg(path)
        .output()
        .expect(program);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

#[test]
fn real_images_pass_in_all_their_variants() {
    let dir = tempfile::tempdir().unwrap();
    let variants = [
        ("v2", "compat=0.10"),
        ("v3", "compat=1.1"),
        ("zlib", "compat=1.1,compression_type=zlib"),
        ("zstd", "compat=1.1,compression_type=zstd"),
        ("extended-l2", "compat=1.1,extended_l2=on"),
        ("lazy", "compat=1.1,lazy_refcounts=on"),
        ("metadata", "preallocation=metadata"),
        ("falloc", "preallocation=falloc"),
        ("big-cluster", "cluster_size=2M"),
        ("small-cluster", "cluster_size=512"),
        ("refcount-1", "refcount_bits=1"),
        ("refcount-64", "refcount_bits=64"),
    ];
    let source = dir.path().join("source.raw");
    let pattern: Vec<u8> = (0..MIB).map(|at| (at / 97 % 251) as u8).collect();
    std::fs::write(&source, pattern).unwrap();
    run("truncate", &["-s", "40M"], &source);
    for (name, options) in variants {
        // Empty, full of data, and (where the variant allows it) compressed.
        let empty = dir.path().join(format!("{name}-empty.qcow2"));
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        let status = Command::new("qemu-img")
            .args(create)
            .arg(&empty)
            .arg("40M")
            .status()
            .unwrap();
        assert!(status.success(), "{name}");
        let mut images = vec![empty];
        for compress in [false, true] {
            if compress && name != "v2" && name != "zlib" && name != "zstd" {
                continue;
            }
            let image = dir.path().join(format!("{name}-{compress}.qcow2"));
            let source = source.to_str().unwrap();
            let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
            if compress {
                arguments.push("-c");
            }
            arguments.push(source);
            run("qemu-img", &arguments, &image);
            images.push(image);
        }
        for image in images {
            let file = File::open(&image).unwrap();
            let found = inspect(&file, Format::Qcow2, &Limits::default())
                .unwrap_or_else(|refusal| panic!("{}: {refusal}", image.display()));
            assert_eq!(found.virtual_size, 40 * MIB);
            assert_eq!(detect(&file).unwrap(), Format::Qcow2);

            // Cut off in the middle of its data, the same image is refused.
            let cut = File::options().write(true).read(true).open(&image).unwrap();
            if name != "falloc" && name != "metadata" && found.file_size > MIB {
                cut.set_len(found.file_size / 2).unwrap();
                let refusal = inspect(&cut, Format::Qcow2, &Limits::default()).unwrap_err();
                assert_eq!(refusal.name(), "truncated", "{}", image.display());
            }
        }
    }
}

#[test]
fn real_bad_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![0; 64 * KIB]).unwrap();
    let backing = base.to_str().unwrap();
    let data = format!(
        "data_file={},data_file_raw=on",
        dir.path().join("d").display()
    );
    let cases: [(&str, Vec<&str>, &str); 4] = [
        (
            "overlay",
            vec!["-f", "qcow2", "-b", backing, "-F", "raw"],
            "backing-file",
        ),
        (
            "data",
            vec!["-f", "qcow2", "-o", &data],
            "external-data-file",
        ),
        ("vmdk", vec!["-f", "vmdk"], "unsupported-container"),
        (
            "vhd",
            vec!["-f", "vpc", "-o", "subformat=fixed"],
            "unsupported-container",
        ),
    ];
    for (name, arguments, reason) in cases {
        let image = dir.path().join(name);
        let output = Command::new("qemu-img")
            .args(["create", "-q"])
            .args(arguments)
            .arg(&image)
            .arg("4M")
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        let file = File::open(&image).unwrap();
        let declared = if name == "vhd" {
            Format::Raw
        } else {
            Format::Qcow2
        };
        let refusal = inspect(&file, declared, &Limits::default()).unwrap_err();
        assert_eq!(refusal.name(), reason, "{name}");
    }
}
