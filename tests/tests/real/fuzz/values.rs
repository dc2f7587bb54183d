// SPDX-License-Identifier: Apache-2.0
//! Hostile and random values: texts, ids, numbers, durations.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};
use uuid::Uuid;

/// What exists, to be named now and then.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) servers: Vec<String>,
    pub(super) domains: Vec<String>,
    pub(super) images: Vec<String>,
    pub(super) operations: Vec<String>,
}

pub(super) const TEXTS: [&str; 24] = [
    "",
    " ",
    "\0",
    "web\0",
    "a\nb",
    "\r\n\r\nHTTP/1.1 200 OK",
    "\u{1b}[2J\u{1b}[31mred",
    "\u{202e}drawkcab",
    "../../../../etc/shadow",
    "..",
    "/dev/sda",
    "</name><devices><disk type='file'/></devices>",
    "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>&e;",
    "']]><!--",
    "'\"`$(reboot);|&",
    "' OR 1=1 --",
    "%s%n%x",
    "{{ 7*7 }}{% include '/etc/passwd' %}",
    "-drive file=/etc/shadow",
    "😀💥\u{fe0f}",
    "ffffffff",
    "operations/../servers",
    "18446744073709551616",
    "\u{10ffff}\u{feff}\u{7f}",
];

pub(super) struct Fuzz<'a> {
    pub(super) rng: StdRng,
    pub(super) known: &'a Known,
}

impl Fuzz<'_> {
    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    /// Text that names nothing.
    pub(super) fn word(&mut self) -> String {
        match self.rng.random_range(0..100) {
            0..40 => (*TEXTS.choose(&mut self.rng).unwrap()).to_owned(),
            // What could be a name or an id.
            40..55 => format!("no-such-{}", self.rng.random::<u16>()),
            55..70 => Uuid::from_u128(self.rng.random()).to_string(),
            70..72 => "A".repeat(1 << 20),
            72..74 => "é\0".repeat(200_000),
            _ => {
                let length = self.rng.random_range(1..300);
                (0..length).map(|_| self.rng.random::<char>()).collect()
            }
        }
    }

    /// Not a uuid, and not absent.
    pub(super) fn bad_id(&mut self) -> String {
        loop {
            let word = self.word();
            if !word.is_empty() && Uuid::try_parse(&word).is_err() {
                return word;
            }
        }
    }

    pub(super) fn maybe_id(&mut self) -> String {
        if self.chance(50) {
            self.word()
        } else {
            String::new()
        }
    }

    pub(super) fn server(&mut self) -> String {
        self.known.servers.choose(&mut self.rng).unwrap().clone()
    }

    pub(super) fn bytes(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.rng.random_range(0..=most)];
        self.rng.fill_bytes(&mut bytes);
        bytes
    }

    /// A number that no enumeration has.
    pub(super) fn bad_enum(&mut self) -> i32 {
        *[99, -1, i32::MIN, i32::MAX, 1 << 20]
            .choose(&mut self.rng)
            .unwrap()
    }

    pub(super) fn number(&mut self) -> i32 {
        *[0, 1, -1, 5, 1000, i32::MIN, i32::MAX]
            .choose(&mut self.rng)
            .unwrap()
    }

    pub(super) fn bad_duration(&mut self) -> Option<prost_types::Duration> {
        let (seconds, nanos) = *[
            (-1, 0),
            (i64::MIN, i32::MIN),
            (i64::MAX, 0),
            (0, 1_000_000_000),
            (0, -5),
            (1, i32::MAX),
            (40 * 86_400, 0),
        ]
        .choose(&mut self.rng)
        .unwrap();
        Some(prost_types::Duration { seconds, nanos })
    }

    pub(super) fn maybe_duration(&mut self) -> Option<prost_types::Duration> {
        if self.chance(50) {
            self.bad_duration()
        } else {
            None
        }
    }
}
