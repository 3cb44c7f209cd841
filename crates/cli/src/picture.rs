//! Pictures in files: PNG, JPEG, BMP, WebP.

use std::path::Path;

use candle_coreml::{ColorSpace, Flexibility, Image, ImageDescription, Pixels};
use half::f16;
use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, Limits};

use crate::failure::Failure;

/// Most pixels along one side of a picture that is read.
const LIMIT_SIDE: u32 = 1 << 15;

/// Reads a picture in the layout the input wants; `resize` gives it the default size where its own is not allowed.
pub fn read(path: &str, wanted: &ImageDescription, resize: bool) -> Result<Image, Failure> {
    let failed = |what: &dyn std::fmt::Display| Failure::new(format!("{path}: {what}"));
    let mut reader = ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(|e| failed(&e))?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(LIMIT_SIDE);
    limits.max_image_height = Some(LIMIT_SIDE);
    reader.limits(limits);
    let mut picture = reader.decode().map_err(|e| failed(&e))?;
    let size = [picture.height() as usize, picture.width() as usize];
    if !allows(wanted, size) {
        let [height, width] = size;
        if !resize {
            return Err(failed(&format!(
                "the picture is {width} x {height}, the input takes {} x {}; --resize fits it",
                wanted.width, wanted.height
            )));
        }
        let side = |n: usize| u32::try_from(n).ok().filter(|n| (1..=LIMIT_SIDE).contains(n));
        let (Some(width), Some(height)) = (side(wanted.width), side(wanted.height)) else {
            return Err(failed(&"the input gives no size to fit it to"));
        };
        picture = picture.resize_exact(width, height, FilterType::Triangle);
    }
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    Ok(Image::new(width, height, pixels(picture, wanted.color))?)
}

fn allows(wanted: &ImageDescription, size: [usize; 2]) -> bool {
    match &wanted.flexibility {
        Flexibility::Fixed => size == [wanted.height, wanted.width],
        Flexibility::Enumerated(sizes) => {
            size == [wanted.height, wanted.width] || sizes.iter().any(|s| *s == size)
        }
        Flexibility::Ranges(ranges) => ranges
            .iter()
            .zip(size)
            .all(|(&(low, high), n)| n >= low && high.is_none_or(|h| n <= h)),
    }
}

fn pixels(picture: DynamicImage, color: ColorSpace) -> Pixels {
    match color {
        ColorSpace::Grayscale => Pixels::Gray(picture.into_luma8().into_raw()),
        ColorSpace::GrayscaleFp16 => {
            let bytes = picture.into_luma8().into_raw();
            Pixels::GrayF16(bytes.into_iter().map(|v| f16::from_f32(v.into())).collect())
        }
        // The engine puts blue first where the model wants it so.
        _ => Pixels::Rgb(picture.into_rgb8().into_raw()),
    }
}

/// Writes 8-bit pixels as a picture file; false for pixels such files do not hold.
pub fn write(path: &Path, picture: &Image) -> Result<bool, Failure> {
    let (bytes, color) = match picture.pixels() {
        Pixels::Gray(bytes) => (bytes, image::ExtendedColorType::L8),
        Pixels::Rgb(bytes) => (bytes, image::ExtendedColorType::Rgb8),
        _ => return Ok(false),
    };
    let side = |n: usize| u32::try_from(n).map_err(|_| Failure::new("the picture is too large for a file"));
    let (width, height) = (side(picture.width())?, side(picture.height())?);
    image::save_buffer(path, bytes, width, height, color)
        .map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
    Ok(true)
}

/// A picture of noise in the default size.
pub fn random(wanted: &ImageDescription, mut number: impl FnMut() -> u32) -> Result<Image, String> {
    let side = LIMIT_SIDE as usize;
    if wanted.width > side || wanted.height > side {
        return Err(format!(
            "no random picture of {} x {} pixels",
            wanted.width, wanted.height
        ));
    }
    let count = wanted.width * wanted.height;
    let mut bytes = |n: usize| (0..n).map(|_| (number() & 0xFF) as u8).collect::<Vec<u8>>();
    let pixels = match wanted.color {
        ColorSpace::Grayscale => Pixels::Gray(bytes(count)),
        ColorSpace::GrayscaleFp16 => Pixels::GrayF16(
            bytes(count)
                .into_iter()
                .map(|v| f16::from_f32(v.into()))
                .collect(),
        ),
        _ => Pixels::Rgb(bytes(3 * count)),
    };
    Image::new(wanted.width, wanted.height, pixels).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(width: usize, height: usize, color: ColorSpace) -> ImageDescription {
        ImageDescription {
            width,
            height,
            color,
            flexibility: Flexibility::Fixed,
        }
    }

    #[test]
    fn a_picture_is_written_and_read_back_and_fitted_only_on_demand() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.png");
        let picture = Image::new(2, 2, Pixels::Rgb((0..12).map(|v| v * 20).collect())).unwrap();
        assert!(write(&path, &picture).unwrap());
        let name = path.to_str().unwrap();
        let same = read(name, &wanted(2, 2, ColorSpace::Rgb), false).unwrap();
        assert_eq!(same, picture);
        let words = read(name, &wanted(4, 3, ColorSpace::Rgb), false).unwrap_err();
        assert!(
            words
                .message()
                .ends_with("the picture is 2 x 2, the input takes 4 x 3; --resize fits it"),
            "{}",
            words.message()
        );
        let grey = read(name, &wanted(4, 3, ColorSpace::Grayscale), true).unwrap();
        assert_eq!((grey.width(), grey.height()), (4, 3));
        assert!(matches!(grey.pixels(), Pixels::Gray(_)));
    }

    #[test]
    fn sizes_are_judged_by_the_flexibility_of_the_input() {
        let with = |flexibility| ImageDescription {
            flexibility,
            ..wanted(4, 3, ColorSpace::Rgb)
        };
        let rows = [
            (Flexibility::Fixed, [3, 4], true),
            (Flexibility::Fixed, [4, 3], false),
            (Flexibility::Enumerated(vec![vec![6, 8]]), [6, 8], true),
            (Flexibility::Enumerated(vec![vec![6, 8]]), [8, 6], false),
            (Flexibility::Ranges(vec![(1, Some(5)), (2, None)]), [5, 100], true),
            (
                Flexibility::Ranges(vec![(1, Some(5)), (2, None)]),
                [6, 100],
                false,
            ),
        ];
        for (flexibility, size, allowed) in rows {
            let description = with(flexibility);
            assert_eq!(allows(&description, size), allowed, "{description:?} {size:?}");
        }
    }
}
