//! Pictures to and from the rows of pixel buffers, which are padded and, for colours, BGRA.

use crate::value::{Picture, PixelFormat, Pixels};
use half::f16;

impl PixelFormat {
    /// The four-character code of Core Video.
    pub fn code(self) -> u32 {
        match self {
            PixelFormat::Gray => u32::from_be_bytes(*b"L008"),
            PixelFormat::GrayF16 => u32::from_be_bytes(*b"L00h"),
            PixelFormat::Bgra => u32::from_be_bytes(*b"BGRA"),
        }
    }

    /// The format of a code, if it is one of these.
    pub fn from_code(code: u32) -> Option<PixelFormat> {
        let all = [PixelFormat::Gray, PixelFormat::GrayF16, PixelFormat::Bgra];
        all.into_iter().find(|f| f.code() == code)
    }

    /// The format a picture is given in.
    pub fn of(pixels: &Pixels) -> PixelFormat {
        match pixels {
            Pixels::Gray(_) => PixelFormat::Gray,
            Pixels::GrayF16(_) => PixelFormat::GrayF16,
            Pixels::Rgb(_) => PixelFormat::Bgra,
        }
    }

    /// Size of a pixel.
    pub fn bytes(self) -> usize {
        match self {
            PixelFormat::Gray => 1,
            PixelFormat::GrayF16 => 2,
            PixelFormat::Bgra => 4,
        }
    }
}

/// Rows of `row_bytes` each; the bytes between the rows stay as they are.
///
/// # Errors
/// What does not fit, in words.
pub fn write_rows(picture: &Picture, row_bytes: usize, rows: &mut [u8]) -> Result<(), String> {
    let format = PixelFormat::of(&picture.pixels);
    check(picture.width, picture.height, format, row_bytes, rows.len())?;
    let lines = rows.chunks_mut(row_bytes).take(picture.height);
    let width = picture.width;
    match &picture.pixels {
        Pixels::Gray(p) => lines
            .zip(p.chunks(width))
            .for_each(|(to, from)| to[..width].copy_from_slice(from)),
        Pixels::GrayF16(p) => lines.zip(p.chunks(width)).for_each(|(to, from)| {
            to[..2 * width].copy_from_slice(bytemuck::cast_slice(from));
        }),
        Pixels::Rgb(p) => lines.zip(p.chunks(3 * width)).for_each(|(to, from)| {
            for (bgra, rgb) in to.chunks_exact_mut(4).zip(from.chunks_exact(3)) {
                bgra.copy_from_slice(&[rgb[2], rgb[1], rgb[0], 255]);
            }
        }),
    }
    Ok(())
}

/// The picture in rows of `row_bytes` each; alpha is dropped.
///
/// # Errors
/// What does not fit, in words.
pub fn read_rows(
    width: usize,
    height: usize,
    format: PixelFormat,
    row_bytes: usize,
    rows: &[u8],
) -> Result<Picture, String> {
    check(width, height, format, row_bytes, rows.len())?;
    let line_bytes = width * format.bytes();
    let lines = rows
        .chunks(row_bytes)
        .take(height)
        .map(|line| &line[..line_bytes]);
    let pixels = match format {
        PixelFormat::Gray => Pixels::Gray(lines.flatten().copied().collect()),
        PixelFormat::GrayF16 => {
            let halves = lines
                .flat_map(|l| l.chunks_exact(2))
                .map(|b| f16::from_ne_bytes([b[0], b[1]]));
            Pixels::GrayF16(halves.collect())
        }
        PixelFormat::Bgra => {
            let colours = lines
                .flat_map(|l| l.chunks_exact(4))
                .flat_map(|p| [p[2], p[1], p[0]]);
            Pixels::Rgb(colours.collect())
        }
    };
    Ok(Picture {
        width,
        height,
        pixels,
    })
}

fn check(
    width: usize,
    height: usize,
    format: PixelFormat,
    row_bytes: usize,
    bytes: usize,
) -> Result<(), String> {
    let line = width.checked_mul(format.bytes());
    let needed = height
        .checked_sub(1)
        .and_then(|h| h.checked_mul(row_bytes)?.checked_add(line?));
    match (line, needed) {
        (Some(line), Some(needed)) if line > 0 && line <= row_bytes && needed <= bytes => Ok(()),
        _ => Err(format!(
            "{bytes} bytes in rows of {row_bytes} for {width} x {height} pixels of {} bytes",
            format.bytes()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_survive_padded_rows() {
        let rgb: Vec<u8> = (0..18).collect();
        let grey: Vec<u8> = (0..6).collect();
        let halves = (0..6).map(|v| f16::from_f32(v as f32 / 4.0)).collect();
        for pixels in [Pixels::Rgb(rgb), Pixels::Gray(grey), Pixels::GrayF16(halves)] {
            let picture = Picture {
                width: 3,
                height: 2,
                pixels,
            };
            let format = PixelFormat::of(&picture.pixels);
            let mut rows = vec![0; 64 + 3 * format.bytes()];
            write_rows(&picture, 64, &mut rows).unwrap();
            assert_eq!(read_rows(3, 2, format, 64, &rows).unwrap(), picture);
            assert!(rows[3 * format.bytes()..64].iter().all(|&b| b == 0));
            assert!(read_rows(3, 2, format, 64, &rows[1..]).is_err());
            assert!(write_rows(&picture, 2, &mut rows).is_err());
            assert_eq!(PixelFormat::from_code(format.code()), Some(format));
        }
        assert!(read_rows(0, 2, PixelFormat::Gray, 64, &[0; 128]).is_err());
        assert!(read_rows(usize::MAX, 2, PixelFormat::Bgra, 64, &[0; 128]).is_err());
    }

    #[test]
    fn colours_are_blue_first_and_opaque() {
        let picture = Picture {
            width: 1,
            height: 1,
            pixels: Pixels::Rgb(vec![1, 2, 3]),
        };
        let mut rows = [0; 4];
        write_rows(&picture, 4, &mut rows).unwrap();
        assert_eq!(rows, [3, 2, 1, 255]);
    }
}
