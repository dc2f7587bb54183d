// SPDX-License-Identifier: Apache-2.0
//! Pictures of a screen as PNG.
//!
//! QEMU gives a PNG since 7.1, and a PPM before; a PPM is rewritten here. The pixels are stored and not
//! compressed: a picture is fetched now and then and looked at once, which is not worth a dependency
//! (docs/adr/0025).

/// The largest picture: 8K in three colours, with room for its headers.
const LARGEST: usize = 7680 * 4320 * 3 + (1 << 20);

/// A picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The PNG file.
    pub png: Vec<u8>,
}

/// What came is no picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// Neither PNG nor PPM.
    #[error("QEMU gave a picture that is neither PNG nor PPM")]
    Format,
    /// Too large.
    #[error("QEMU gave a picture of more than {} MiB", LARGEST >> 20)]
    TooLarge,
    /// It ends too early, or its sizes make no sense.
    #[error("QEMU gave a picture that is damaged")]
    Damaged,
}

const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";

/// What QEMU gave, as a PNG.
///
/// # Errors
/// [`PictureError`].
pub fn png(given: Vec<u8>) -> Result<Picture, PictureError> {
    if given.len() > LARGEST {
        return Err(PictureError::TooLarge);
    }
    if given.starts_with(SIGNATURE) {
        // Length and name of the first chunk, then width and height.
        let number = |at: usize| -> Option<u32> {
            let bytes = given.get(at..at.checked_add(4)?)?;
            Some(u32::from_be_bytes(bytes.try_into().ok()?))
        };
        let (width, height) = number(16).zip(number(20)).ok_or(PictureError::Damaged)?;
        return Ok(Picture {
            width,
            height,
            png: given,
        });
    }
    let (width, height, pixels) = ppm(&given)?;
    Ok(Picture {
        width,
        height,
        png: encode(width, height, pixels),
    })
}

/// Reads a PPM of one byte for each colour: `P6`, width, height, 255, pixels.
fn ppm(file: &[u8]) -> Result<(u32, u32, &[u8]), PictureError> {
    let mut rest = file.strip_prefix(b"P6").ok_or(PictureError::Format)?;
    let mut number = || {
        let begin = rest.iter().position(u8::is_ascii_digit)?;
        let (blanks, behind) = rest.split_at_checked(begin)?;
        let end = behind.iter().position(|byte| !byte.is_ascii_digit())?;
        let (digits, behind) = behind.split_at_checked(end)?;
        rest = behind;
        let blank = !blanks.is_empty() && blanks.iter().all(u8::is_ascii_whitespace);
        let text = std::str::from_utf8(digits).ok().filter(|_| blank)?;
        text.parse::<u32>().ok()
    };
    let sizes = (number(), number(), number());
    let (Some(width @ 1..), Some(height @ 1..), Some(255)) = sizes else {
        return Err(PictureError::Damaged);
    };
    let needed = usize::try_from(width)
        .ok()
        .zip(usize::try_from(height).ok())
        .and_then(|(width, height)| width.checked_mul(height)?.checked_mul(3));
    // One blank ends the header.
    let pixels = needed.and_then(|needed| rest.get(1..needed.checked_add(1)?));
    Ok((width, height, pixels.ok_or(PictureError::Damaged)?))
}

/// A PNG of eight bits for each of three colours (PNG specification, sections 5, 10 and 11).
fn encode(width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
    let row = usize::try_from(width).map_or(0, |width| width.saturating_mul(3));
    // Each row begins with the number of its filter: none.
    let mut rows = Vec::with_capacity(pixels.len().saturating_add(pixels.len() / row.max(1)));
    for pixels in pixels.chunks(row.max(1)) {
        rows.push(0);
        rows.extend_from_slice(pixels);
    }
    let mut header = Vec::with_capacity(13);
    header.extend_from_slice(&width.to_be_bytes());
    header.extend_from_slice(&height.to_be_bytes());
    // Eight bits, three colours, the only compression and filtering there are, not interlaced.
    header.extend_from_slice(&[8, 2, 0, 0, 0]);
    let mut file = SIGNATURE.to_vec();
    chunk(&mut file, b"IHDR", &header);
    chunk(&mut file, b"IDAT", &stored(&rows));
    chunk(&mut file, b"IEND", &[]);
    file
}

/// A zlib stream of stored blocks (RFC 1950, RFC 1951 section 3.2.4).
fn stored(bytes: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x78, 0x01];
    let mut blocks = bytes.chunks(usize::from(u16::MAX)).peekable();
    while let Some(block) = blocks.next() {
        let length = u16::try_from(block.len()).unwrap_or(u16::MAX);
        stream.push(u8::from(blocks.peek().is_none()));
        stream.extend_from_slice(&length.to_le_bytes());
        stream.extend_from_slice(&(!length).to_le_bytes());
        stream.extend_from_slice(block);
    }
    stream.extend_from_slice(&adler32(bytes).to_be_bytes());
    stream
}

fn chunk(file: &mut Vec<u8>, name: &[u8; 4], data: &[u8]) {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    file.extend_from_slice(&length.to_be_bytes());
    file.extend_from_slice(name);
    file.extend_from_slice(data);
    let sum = crc32(crc32(u32::MAX, name), data) ^ u32::MAX;
    file.extend_from_slice(&sum.to_be_bytes());
}

fn adler32(bytes: &[u8]) -> u32 {
    const PRIME: u32 = 65_521;
    let (mut a, mut b) = (1_u32, 0_u32);
    // So many additions cannot overflow.
    for block in bytes.chunks(5_552) {
        for byte in block {
            a += u32::from(*byte);
            b += a;
        }
        a %= PRIME;
        b %= PRIME;
    }
    b << 16 | a
}

/// CRC-32 with the polynomial of PNG, four bits at a time; `sum` is what was before.
fn crc32(sum: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 16] = {
        let mut table = [0; 16];
        let mut entry = 0_u32;
        let mut rest: &mut [u32] = &mut table;
        while let [slot, others @ ..] = rest {
            let (mut value, mut bit) = (entry, 0);
            while bit < 4 {
                value = if value & 1 == 1 {
                    value >> 1 ^ 0xedb8_8320
                } else {
                    value >> 1
                };
                bit += 1;
            }
            *slot = value;
            entry += 1;
            rest = others;
        }
        table
    };
    let step = |sum: u32| {
        let entry = usize::try_from(sum & 15).unwrap_or(0);
        TABLE.get(entry).copied().unwrap_or(0) ^ sum >> 4
    };
    bytes
        .iter()
        .fold(sum, |sum, byte| step(step(sum ^ u32::from(*byte))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use super::*;

    #[test]
    fn sums_are_the_known_ones() {
        assert_eq!(crc32(u32::MAX, b"123456789") ^ u32::MAX, 0xcbf4_3926);
        assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
        assert_eq!(adler32(&vec![0xff; 1 << 20]), {
            let (mut a, mut b) = (1_u64, 0_u64);
            for _ in 0..1 << 20 {
                a = (a + 0xff) % 65_521;
                b = (b + a) % 65_521;
            }
            u32::try_from(b << 16 | a).unwrap()
        });
    }

    /// Takes a PNG of ours apart again.
    fn pixels_of(png: &[u8]) -> Vec<u8> {
        let mut rest = png.strip_prefix(SIGNATURE).unwrap();
        let mut stream = Vec::new();
        while !rest.is_empty() {
            let length =
                usize::try_from(u32::from_be_bytes(rest[..4].try_into().unwrap())).unwrap();
            let sum = u32::from_be_bytes(rest[8 + length..12 + length].try_into().unwrap());
            assert_eq!(crc32(u32::MAX, &rest[4..8 + length]) ^ u32::MAX, sum);
            if &rest[4..8] == b"IDAT" {
                stream.extend_from_slice(&rest[8..8 + length]);
            }
            rest = &rest[12 + length..];
        }
        let mut rows = Vec::new();
        let mut blocks = &stream[2..];
        loop {
            let length = u16::from_le_bytes(blocks[1..3].try_into().unwrap());
            assert_eq!(
                !length,
                u16::from_le_bytes(blocks[3..5].try_into().unwrap())
            );
            let (last, end) = (blocks[0] == 1, 5 + usize::from(length));
            rows.extend_from_slice(&blocks[5..end]);
            blocks = &blocks[end..];
            if last {
                break;
            }
        }
        assert_eq!(blocks, adler32(&rows).to_be_bytes());
        rows
    }

    #[test]
    fn a_ppm_becomes_a_png_with_the_same_pixels() {
        for (width, height) in [(1_u32, 1_u32), (3, 2), (320, 240)] {
            let count = usize::try_from(width * height * 3).unwrap();
            let pixels: Vec<u8> = (0..count).map(|n| u8::try_from(n % 256).unwrap()).collect();
            let mut given = format!("P6\n{width} {height}\n255\n").into_bytes();
            given.extend_from_slice(&pixels);
            let picture = png(given).unwrap();
            assert_eq!((picture.width, picture.height), (width, height));
            let row = usize::try_from(width * 3).unwrap();
            let expected: Vec<u8> = pixels
                .chunks(row)
                .flat_map(|row| std::iter::once(&0).chain(row))
                .copied()
                .collect();
            assert_eq!(pixels_of(&picture.png), expected);
            // What is a PNG already stays as it is.
            assert_eq!(png(picture.png.clone()).unwrap(), picture);
        }
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        use PictureError::{Damaged, Format, TooLarge};
        let cases: [(&[u8], PictureError); 9] = [
            (b"", Format),
            (b"GIF89a", Format),
            (b"P6", Damaged),
            (b"P6\n2 2\n255\nabc", Damaged),
            (b"P6\n0 2\n255\n", Damaged),
            (b"P6\n4294967295 4294967295\n255\nx", Damaged),
            (b"P6\n1 1\n65535\n123456", Damaged),
            (b"P6 # no\n1 1\n255\nabc", Damaged),
            (b"\x89PNG\r\n\x1a\nIHDR", Damaged),
        ];
        for (given, error) in cases {
            assert_eq!(png(given.to_vec()), Err(error), "{given:?}");
        }
        assert_eq!(png(vec![0; LARGEST + 1]), Err(TooLarge));
    }
}
