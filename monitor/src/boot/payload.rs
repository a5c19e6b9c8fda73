//! The compressed kernel inside a bzImage: finding it by the setup header and unpacking it.
//!
//! The payload is what `arch/x86/boot/compressed` appends: an ELF file (vmlinux stripped, with the relocations behind
//! it), packed by one of seven compressors, and for all but gzip four bytes more that hold the unpacked size
//! (Linux Documentation/arch/x86/boot.rst, "payload_offset"; scripts/Makefile.lib, size_append).

use std::io::{self, Read};

use thiserror::Error;

/// More than any kernel unpacks to; a file that claims more is broken or hostile.
pub const MAX_UNPACKED: usize = 512 << 20;

/// Why there is no unpacked kernel.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// No `HdrS` at 0x202.
    #[error("not a bzImage: no setup header")]
    NotBzImage,
    /// The header ends before the fields, or they point outside the file.
    #[error("bzImage is truncated: the payload would end at byte {end} of {length}")]
    Truncated {
        /// File offset of the payload's end.
        end: u64,
        /// Length of the file in bytes.
        length: usize,
    },
    /// Protocol below 2.08 has no payload fields.
    #[error("boot protocol {major}.{minor:02} does not say where the kernel is; 2.08 or later is needed")]
    TooOld {
        /// Major protocol version.
        major: u8,
        /// Minor protocol version.
        minor: u8,
    },
    /// None of the magic numbers.
    #[error("the kernel is packed in a way that is not known (it starts with {0:02x?})")]
    UnknownPacker([u8; 6]),
    /// The unpacker refused.
    #[error("the {packer} payload is corrupt: {reason}")]
    Corrupt {
        /// Which format.
        packer: Packer,
        /// What the unpacker said.
        reason: String,
    },
    /// It goes on beyond [`MAX_UNPACKED`].
    #[error("the {0} payload unpacks to more than {limit} MiB", limit = MAX_UNPACKED >> 20)]
    TooLarge(Packer),
}

/// How a payload is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packer {
    /// CONFIG_KERNEL_UNCOMPRESSED and what is left when somebody unpacked it in place.
    None,
    /// CONFIG_KERNEL_GZIP
    Gzip,
    /// CONFIG_KERNEL_BZIP2
    Bzip2,
    /// CONFIG_KERNEL_LZMA
    Lzma,
    /// CONFIG_KERNEL_XZ
    Xz,
    /// CONFIG_KERNEL_LZO
    Lzo,
    /// CONFIG_KERNEL_LZ4 (the legacy frame)
    Lz4,
    /// CONFIG_KERNEL_ZSTD
    Zstd,
}

impl std::fmt::Display for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "unpacked",
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

impl Packer {
    /// Tells by the magic number (Linux lib/decompress.c).
    #[must_use]
    pub fn detect(payload: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Packer); 9] = [
            (b"\x7fELF", Packer::None),
            (&[0x1f, 0x8b], Packer::Gzip),
            (&[0x1f, 0x9e], Packer::Gzip),
            (b"BZh", Packer::Bzip2),
            (&[0x5d, 0x00], Packer::Lzma),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Packer::Xz),
            (&[0x89, b'L', b'Z'], Packer::Lzo),
            (&[0x02, 0x21, 0x4c, 0x18], Packer::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Packer::Zstd),
        ];
        MAGIC.iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, packer)| *packer)
    }
}

/// The packed kernel in a bzImage, as it lies in the file.
pub fn locate(bzimage: &[u8]) -> Result<&[u8], PayloadError> {
    let byte = |at: usize| bzimage.get(at).copied();
    let long = |at: usize| {
        let bytes = bzimage.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if bzimage.get(0x202..0x206) != Some(b"HdrS") {
        return Err(PayloadError::NotBzImage);
    }
    let truncated = |end| PayloadError::Truncated { end, length: bzimage.len() };
    let (minor, major) = byte(0x206).zip(byte(0x207)).ok_or(truncated(0x208))?;
    if (major, minor) < (2, 8) {
        return Err(PayloadError::TooOld { major, minor });
    }
    let (offset, length) = long(0x248).zip(long(0x24c)).ok_or(truncated(0x250))?;
    // setup_sects of 0 means 4 (boot.rst, "setup_sects"); the boot sector comes on top.
    let setup_sectors = match byte(0x1f1) {
        None | Some(0) => 4,
        Some(count) => u64::from(count),
    };
    let start = (setup_sectors + 1) * 512 + u64::from(offset);
    let end = start + u64::from(length);
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    range.and_then(|(start, end)| bzimage.get(start..end)).ok_or(truncated(end))
}

/// The kernel's ELF file from a bzImage, unpacked, with the relocations that lie behind it.
pub fn unpack(bzimage: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let payload = locate(bzimage)?;
    let Some(packer) = Packer::detect(payload) else {
        let mut start = [0; 6];
        start.iter_mut().zip(payload).for_each(|(to, from)| *to = *from);
        return Err(PayloadError::UnknownPacker(start));
    };
    unpack_payload(packer, payload)
}

fn unpack_payload(packer: Packer, payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let corrupt = |reason: String| PayloadError::Corrupt { packer, reason };
    let read = |reader: &mut dyn Read| drain(packer, reader);
    match packer {
        Packer::None => Ok(payload.to_vec()),
        Packer::Gzip => read(&mut flate2::read::GzDecoder::new(payload)),
        Packer::Bzip2 => read(&mut bzip2::read::BzDecoder::new(payload)),
        Packer::Xz => read(&mut lzma_rust2::XzReader::new(payload, false)),
        Packer::Lzma => {
            let limit = (MAX_UNPACKED >> 10) as u32;
            let mut reader = lzma_rust2::LzmaReader::new_mem_limit(payload, limit, None)
                .map_err(|error| corrupt(error.to_string()))?;
            read(&mut reader)
        }
        Packer::Zstd => {
            let mut reader = ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|error| corrupt(error.to_string()))?;
            read(&mut reader)
        }
        Packer::Lz4 => lz4_legacy(payload),
        Packer::Lzo => lzop(payload),
    }
}

fn drain(packer: Packer, reader: &mut dyn Read) -> Result<Vec<u8>, PayloadError> {
    let mut unpacked = Vec::new();
    let corrupt = |error: io::Error| PayloadError::Corrupt { packer, reason: error.to_string() };
    reader.take(MAX_UNPACKED as u64 + 1).read_to_end(&mut unpacked).map_err(corrupt)?;
    if unpacked.len() > MAX_UNPACKED { Err(PayloadError::TooLarge(packer)) } else { Ok(unpacked) }
}

/// Takes numbers and bytes off the front of a container format.
struct Cursor<'a> {
    rest: &'a [u8],
    packer: Packer,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], PayloadError> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(PayloadError::Corrupt { packer: self.packer, reason: "it ends too early".into() });
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PayloadError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn be32(&mut self) -> Result<u32, PayloadError> {
        Ok(u32::from_be_bytes(self.array()?))
    }
}

/// The frame `lz4 -l` writes: a magic number, then blocks of at most 8 MiB, each behind its packed length
/// (Linux lib/decompress_unlz4.c).
fn lz4_legacy(payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
    const BLOCK: usize = 8 << 20;
    let packer = Packer::Lz4;
    let mut cursor = Cursor { rest: payload, packer };
    cursor.take(4)?;
    let mut unpacked = Vec::new();
    let mut block = vec![0; BLOCK];
    // What is left at the end is the unpacked size.
    while cursor.rest.len() > 4 {
        let length = u32::from_le_bytes(cursor.array()?) as usize;
        let packed = cursor.take(length)?;
        let count = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| PayloadError::Corrupt { packer, reason: error.to_string() })?;
        unpacked.extend_from_slice(block.get(..count).unwrap_or_default());
        if unpacked.len() > MAX_UNPACKED {
            return Err(PayloadError::TooLarge(packer));
        }
    }
    Ok(unpacked)
}

/// The file format of `lzop`, as far as the kernel's own reader knows it (Linux lib/decompress_unlzo.c).
fn lzop(payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
    const BLOCK: usize = 256 << 10;
    const HAS_FILTER: u32 = 0x800;
    let packer = Packer::Lzo;
    let corrupt = |reason: String| PayloadError::Corrupt { packer, reason };
    let mut cursor = Cursor { rest: payload, packer };
    cursor.take(9)?;
    let version = u16::from_be_bytes(cursor.array()?);
    let with_level = version >= 0x0940;
    // Library version, version needed, method, and in newer files the level.
    cursor.take(if with_level { 6 } else { 5 })?;
    if cursor.be32()? & HAS_FILTER != 0 {
        cursor.take(4)?;
    }
    // Mode and time, the latter in two parts in newer files.
    cursor.take(if with_level { 12 } else { 8 })?;
    let [name] = cursor.array()?;
    cursor.take(usize::from(name) + 4)?;
    let mut unpacked = Vec::new();
    let mut block = vec![0; BLOCK];
    loop {
        let plain_length = cursor.be32()? as usize;
        if plain_length == 0 {
            return Ok(unpacked);
        }
        let packed_length = cursor.be32()? as usize;
        cursor.take(4)?; // the block's checksum
        let packed = cursor.take(packed_length)?;
        let room = block.get_mut(..plain_length).ok_or_else(|| corrupt("a block is too large".into()))?;
        if packed_length == plain_length {
            unpacked.extend_from_slice(packed);
        } else {
            let count = lzokay::decompress::decompress(packed, room)
                .map_err(|error| corrupt(format!("{error:?}")))?;
            unpacked.extend_from_slice(room.get(..count).unwrap_or_default());
        }
        if unpacked.len() > MAX_UNPACKED {
            return Err(PayloadError::TooLarge(packer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn plain() -> Vec<u8> {
        // Longer than an LZO block, and with calls in it for an x86 filter to find.
        (0..400_000_u32).flat_map(|n| [0xe8, n as u8, (n >> 8) as u8, 0, 0]).collect()
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512 + 16];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&[0x0f, 2]);
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"behind the payload");
        image
    }

    fn with_size(mut packed: Vec<u8>) -> Vec<u8> {
        packed.extend_from_slice(&(plain().len() as u32).to_le_bytes());
        packed
    }

    fn gzip() -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain()).unwrap();
        encoder.finish().unwrap()
    }

    fn bzip2() -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(&plain()).unwrap();
        with_size(encoder.finish().unwrap())
    }

    fn xz_with_x86_filter() -> Vec<u8> {
        let mut options = lzma_rust2::XzOptions::with_preset(1);
        options.prepend_pre_filter(lzma_rust2::filter::FilterType::BcjX86, 0);
        let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        encoder.write_all(&plain()).unwrap();
        with_size(encoder.finish().unwrap())
    }

    fn lzma() -> Vec<u8> {
        let options = lzma_rust2::LzmaOptions::with_preset(1);
        let mut encoder = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
        encoder.write_all(&plain()).unwrap();
        with_size(encoder.finish().unwrap())
    }

    fn zstd() -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        with_size(ruzstd::encoding::compress_to_vec(plain().as_slice(), level))
    }

    fn lz4() -> Vec<u8> {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for block in plain().chunks(1 << 20) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        with_size(packed)
    }

    fn lzo() -> Vec<u8> {
        let mut packed = b"\x89LZO\0\r\n\x1a\n".to_vec();
        packed.extend([0x10, 0x30, 0x20, 0xa0, 0x09, 0x40, 3, 9]);
        packed.extend([0; 4 + 12]); // flags, mode, time
        packed.extend([4, b'n', b'a', b'm', b'e', 0, 0, 0, 0]);
        for block in plain().chunks(256 << 10) {
            let squeezed = lzokay::compress::compress(block).unwrap();
            packed.extend((block.len() as u32).to_be_bytes());
            packed.extend((squeezed.len() as u32).to_be_bytes());
            packed.extend([0; 4]);
            packed.extend(squeezed);
        }
        packed.extend([0; 4]);
        with_size(packed)
    }

    fn every_packer() -> Vec<(Packer, Vec<u8>)> {
        vec![
            (Packer::Gzip, gzip()),
            (Packer::Bzip2, bzip2()),
            (Packer::Xz, xz_with_x86_filter()),
            (Packer::Lzma, lzma()),
            (Packer::Zstd, zstd()),
            (Packer::Lz4, lz4()),
            (Packer::Lzo, lzo()),
        ]
    }

    #[test]
    fn every_packer_of_linux_is_known_by_its_magic_and_unpacked() {
        for (packer, packed) in every_packer() {
            assert_eq!(Packer::detect(&packed), Some(packer));
            let unpacked = unpack(&bzimage(&packed)).unwrap();
            assert!(unpacked == plain(), "{packer}: {} bytes", unpacked.len());
        }
    }

    #[test]
    fn a_payload_cut_short_is_an_error_and_nothing_worse() {
        for (packer, packed) in every_packer() {
            for keep in [6, 40, packed.len() / 2] {
                let result = unpack(&bzimage(&packed[..keep]));
                assert!(result.is_err() || result.unwrap().len() < plain().len(), "{packer} {keep}");
            }
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let good = bzimage(&gzip());
        assert!(matches!(unpack(&good[..0x204]), Err(PayloadError::NotBzImage)));
        assert!(matches!(unpack(&good[..0x24a]), Err(PayloadError::Truncated { .. })));
        assert!(matches!(unpack(&good[..good.len() / 2]), Err(PayloadError::Truncated { .. })));
        let mut bad = good.clone();
        bad[0x24c..0x250].copy_from_slice(&[0xff; 4]);
        assert!(matches!(unpack(&bad), Err(PayloadError::Truncated { .. })));
        let mut bad = good.clone();
        bad[0x206] = 7;
        assert!(matches!(unpack(&bad), Err(PayloadError::TooOld { major: 2, minor: 7 })));
        assert!(matches!(unpack(&bzimage(b"what is this?")), Err(PayloadError::UnknownPacker(_))));
        assert!(matches!(unpack(b""), Err(PayloadError::NotBzImage)));
    }
}
