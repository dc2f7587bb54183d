// SPDX-License-Identifier: Apache-2.0
//! The administrator's password: made or taken, checked, hashed, and then forgotten.
//!
//! The clear text lives in [`AdminPass`] from the request to its one answer. It has no `Serialize` and
//! no `Display`, its `Debug` shows nothing, and its memory is wiped when it goes. Everything that is
//! stored or sent on gets the [`CryptHash`].

use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{CryptoRng, Rng};
use secrecy::{ExposeSecret as _, SecretString};
use sha_crypt::{Sha512Params, sha512_crypt_b64};

use crate::hypervisor::CryptHash;

/// Nova's `password_length`.
const LENGTH: usize = 12;
/// Nova's classes, without the letters and digits that look alike (0 O, 1 I l).
const CLASSES: [&[u8]; 3] = [
    b"23456789",
    b"ABCDEFGHJKLMNPQRSTUVWXYZ",
    b"abcdefghijkmnopqrstuvwxyz",
];
/// The longest password that is taken, in bytes. The time to hash grows with it.
pub const LONGEST: usize = 128;
/// The alphabet of crypt(3) salts, and the longest salt of SHA-512.
const SALT: &[u8] = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const SALT_LENGTH: usize = 16;

/// Why a password is not taken, or not hashed. Never says what it is.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// Nothing, or too much.
    #[error("the password has {length} bytes; it must have 1 to {LONGEST}")]
    Length {
        /// Its length.
        length: usize,
    },
    /// A character that one of the ways to set a password cannot carry.
    #[error("the password must consist of printable characters without a colon")]
    Characters,
    /// The hash could not be made. Its parameters are constants, so this is not the password's fault.
    #[error("the password could not be hashed")]
    Hash,
}

/// A password in clear.
pub struct AdminPass(SecretString);

impl std::fmt::Debug for AdminPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdminPass(…)")
    }
}

impl AdminPass {
    /// Takes a password that a user chose.
    ///
    /// The rules are those of the narrowest way to set one: `chpasswd` in the guest reads lines of
    /// `user:password`, and a console can only type what is printable.
    ///
    /// # Errors
    /// [`PasswordError::Length`] or [`PasswordError::Characters`].
    pub fn new(clear: String) -> Result<Self, PasswordError> {
        // Wrapped first, so that a refused password is wiped too.
        let secret = Self(SecretString::from(clear));
        let clear = secret.0.expose_secret();
        if !(1..=LONGEST).contains(&clear.len()) {
            return Err(PasswordError::Length {
                length: clear.len(),
            });
        }
        if clear
            .chars()
            .any(|letter| letter.is_control() || letter == ':')
        {
            return Err(PasswordError::Characters);
        }
        Ok(secret)
    }

    /// Makes a password by Nova's rules: twelve characters, each class at least once, in an order
    /// that says nothing about the classes. About 68 bits.
    #[must_use]
    pub fn generate() -> Self {
        Self::generate_with(&mut rand::rng())
    }

    fn generate_with(random: &mut (impl Rng + CryptoRng)) -> Self {
        let all = CLASSES.concat();
        let mut letters: Vec<u8> = CLASSES
            .iter()
            .filter_map(|class| class.choose(random).copied())
            .collect();
        while letters.len() < LENGTH {
            letters.extend(all.choose(random));
        }
        letters.shuffle(random);
        let clear: String = letters.iter().copied().map(char::from).collect();
        secrecy::zeroize::Zeroize::zeroize(&mut letters);
        Self(SecretString::from(clear))
    }

    /// The clear text, for the one answer to the request.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// Its crypt(3) hash: SHA-512, a random salt, the usual 5,000 rounds. Takes milliseconds of CPU.
    ///
    /// # Errors
    /// [`PasswordError::Hash`].
    pub fn crypt_sha512(&self) -> Result<CryptHash, PasswordError> {
        let mut random = rand::rng();
        let salt: String = (0..SALT_LENGTH)
            .filter_map(|_| SALT.choose(&mut random).copied().map(char::from))
            .collect();
        self.crypt_with(&salt)
    }

    fn crypt_with(&self, salt: &str) -> Result<CryptHash, PasswordError> {
        let hash = sha512_crypt_b64(
            self.expose().as_bytes(),
            salt.as_bytes(),
            &Sha512Params::default(),
        )
        .map_err(|_| PasswordError::Hash)?;
        Ok(CryptHash(format!("$6${salt}${hash}")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn generated_passwords_have_every_class_and_never_repeat() {
        let mut seen = HashSet::new();
        for _ in 0..2_000 {
            let password = AdminPass::generate();
            let clear = password.expose().to_owned();
            assert_eq!(clear.len(), LENGTH);
            for class in CLASSES {
                assert!(clear.bytes().any(|byte| class.contains(&byte)), "{clear}");
            }
            assert!(
                clear
                    .bytes()
                    .all(|byte| CLASSES.iter().any(|class| class.contains(&byte)))
            );
            assert!(AdminPass::new(clear.clone()).is_ok());
            assert!(seen.insert(clear), "repeated");
        }
        // Shuffled: the first character is not always a digit.
        assert!(
            seen.iter()
                .any(|clear| !clear.starts_with(|c: char| c.is_ascii_digit()))
        );
    }

    #[test]
    fn passwords_that_some_way_cannot_carry_are_refused() {
        let long = "x".repeat(LONGEST + 1);
        for clear in [
            "",
            "a\nb",
            "a\rb",
            "a\0b",
            "a:b",
            "a\tb",
            "\u{1b}[2J",
            "a\u{85}b",
            &long,
        ] {
            assert!(AdminPass::new(clear.to_owned()).is_err(), "{clear:?}");
        }
        for clear in ["x", "pass word", "Grüße'\"\\$`", &"x".repeat(LONGEST)] {
            assert!(AdminPass::new(clear.to_owned()).is_ok(), "{clear:?}");
        }
    }

    #[test]
    fn hashes_are_those_of_crypt() {
        // A test vector of the SHA-crypt specification.
        let password = AdminPass::new("Hello world!".to_owned()).unwrap();
        assert_eq!(
            password.crypt_with("saltstring").unwrap().0,
            "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1"
        );
        for clear in ["x", "Grüße 'n' \"$HOME\"", &"long".repeat(32)] {
            let hash = AdminPass::new(clear.to_owned())
                .unwrap()
                .crypt_sha512()
                .unwrap();
            let salt = hash.0.split('$').nth(2).unwrap();
            assert_eq!(salt.len(), SALT_LENGTH);
            let mut openssl = Command::new("openssl")
                .args(["passwd", "-6", "-salt", salt, "-stdin"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            openssl
                .stdin
                .take()
                .unwrap()
                .write_all(clear.as_bytes())
                .unwrap();
            let output = openssl.wait_with_output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), hash.0);
        }
    }

    #[test]
    fn the_same_password_never_has_the_same_hash_twice() {
        let password = AdminPass::generate();
        let first = password.crypt_sha512().unwrap();
        assert_ne!(first, password.crypt_sha512().unwrap());
        assert!(!first.0.contains(password.expose()));
    }

    #[test]
    fn nothing_printed_shows_a_password() {
        let password = AdminPass::new("hunter2".to_owned()).unwrap();
        let hash = password.crypt_sha512().unwrap();
        let refused = AdminPass::new("hunter2:".to_owned()).unwrap_err();
        let printed = format!("{password:?} {hash:?} {refused} {refused:?}");
        assert!(
            !printed.contains("hunter2") && !printed.contains("$6$"),
            "{printed}"
        );
    }
}
