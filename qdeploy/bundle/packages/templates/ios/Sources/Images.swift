import CoreGraphics
import CoreML
import Foundation
import ImageIO

extension Model {
    /// The outputs for an image.
    public func run(_ image: CGImage) throws -> [String: [Double]] {
        try run([{{input}}: input(sized(pixels(image)))])
    }
}

/// An image file as it is stored: in its own size, not turned as its EXIF data ask.
public func decoded(_ file: Data) throws -> CGImage {
    guard let source = CGImageSourceCreateWithData(file as CFData, nil),
        let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
    else { throw ImageError(description: "Image I/O cannot decode this.") }
    return image
}

/// The pixels of an image in the colors that the model takes; what is transparent becomes black.
public func pixels(_ image: CGImage) throws -> Pixels {
    if let space = image.colorSpace, space.model == .monochrome {
        let values = try drawn(image, bytes: 1, in: space, .none)
        return pixels(width: image.width, height: image.height, rgbx: values.flatMap { [$0, $0, $0, 0] })
    }
    // In the image's own RGB space, if it has one: then no value is converted.
    let own = image.colorSpace.flatMap { $0.model == .rgb ? $0 : nil }
    let values = try drawn(image, bytes: 4, in: own ?? CGColorSpaceCreateDeviceRGB(), .noneSkipLast)
    return pixels(width: image.width, height: image.height, rgbx: values)
}

private func drawn(
    _ image: CGImage, bytes: Int, in space: CGColorSpace, _ alpha: CGImageAlphaInfo
) throws -> [UInt8] {
    var values = [UInt8](repeating: 0, count: image.width * image.height * bytes)
    try values.withUnsafeMutableBytes { buffer in
        guard
            let context = CGContext(
                data: buffer.baseAddress, width: image.width, height: image.height, bitsPerComponent: 8,
                bytesPerRow: image.width * bytes, space: space, bitmapInfo: alpha.rawValue)
        else { throw ImageError(description: "The image's colors cannot be drawn.") }
        context.draw(image, in: CGRect(x: 0, y: 0, width: image.width, height: image.height))
    }
    return values
}
