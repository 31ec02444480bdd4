// How an image is brought to the size and the colors that the model takes.
private let resize: Int? = {{resize}} // pixels of the shorter side, bilinear, aspect kept; nil leaves the size
private let crop: (height: Int, width: Int)? = {{crop}} // the central rectangle; nil keeps all
private let gray = {{gray}}

/// Values from 0 to 255, row by row, each pixel with its channels: red, green and blue, or gray alone.
public struct Pixels {
    public let width: Int
    public let height: Int
    public let channels: Int
    public let values: [UInt8]

    public init(width: Int, height: Int, channels: Int, values: [UInt8]) {
        self.width = width
        self.height = height
        self.channels = channels
        self.values = values
    }
}

/// Why an image cannot become the model's input.
public struct ImageError: Error, CustomStringConvertible {
    public let description: String
}

/// The pixels of an image in the colors that the model takes, of its bytes red, green, blue and one that is not read.
public func pixels(width: Int, height: Int, rgbx: [UInt8]) -> Pixels {
    var values: [UInt8] = []
    values.reserveCapacity(width * height * (gray ? 1 : 3))
    for i in stride(from: 0, to: rgbx.count, by: 4) {
        if gray {
            let (red, green, blue) = (Int(rgbx[i]), Int(rgbx[i + 1]), Int(rgbx[i + 2]))
            values.append(UInt8((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)) // ITU-R 601-2
        } else {
            values += rgbx[i..<i + 3]
        }
    }
    return Pixels(width: width, height: height, channels: gray ? 1 : 3, values: values)
}

/// The image as large as the model takes it.
public func sized(_ image: Pixels) throws -> Pixels {
    try cropped(resized(image))
}

/// The image with its shorter side `resize` pixels long; the longer one is rounded down.
private func resized(_ image: Pixels) -> Pixels {
    guard let resize else { return image }
    let shorter = min(image.width, image.height)
    let (width, height) = (resize * image.width / shorter, resize * image.height / shorter)
    var values: [UInt8]
    if image.height - height > max(0, 2 * (image.width - width)) { // then Pillow 13 begins with the height
        values = resampled(image.values, 1, image.height, image.width * image.channels, to: height)
        values = resampled(values, height, image.width, image.channels, to: width)
    } else {
        values = resampled(image.values, image.height, image.width, image.channels, to: width)
        values = resampled(values, 1, image.height, width * image.channels, to: height)
    }
    return Pixels(width: width, height: height, channels: image.channels, values: values)
}

/// The middle axis of [outer, size, inner] brought to another length, as Pillow does it: each value is a mean of those
/// below a triangle as wide as two steps, rounded to a whole number. Core Graphics interpolates in ways of its own.
private func resampled(_ values: [UInt8], _ outer: Int, _ size: Int, _ inner: Int, to length: Int) -> [UInt8] {
    let step = Double(size) / Double(length)
    let reach = max(step, 1)
    var result = [UInt8](repeating: 0, count: outer * length * inner)
    for position in 0..<length {
        let center = (Double(position) + 0.5) * step
        let first = max(Int(center - reach + 0.5), 0)
        let weights = triangle(first, min(Int(center + reach + 0.5), size), center, reach)
        for i in 0..<outer {
            for j in 0..<inner {
                var sum = 1 << (bits - 1)
                for (k, weight) in weights.enumerated() {
                    sum += weight * Int(values[(i * size + first + k) * inner + j])
                }
                result[(i * length + position) * inner + j] = UInt8(sum >> bits)
            }
        }
    }
    return result
}

private let bits = 22

/// Weights of the places from first to last, whose sum is 1, in steps of 2^-bits.
private func triangle(_ first: Int, _ last: Int, _ center: Double, _ reach: Double) -> [Int] {
    let heights = (first..<last).map { max(0, 1 - abs((Double($0) - center + 0.5) * (1 / reach))) }
    let sum = heights.reduce(0, +)
    return heights.map { Int($0 / sum * Double(1 << bits) + 0.5) }
}

/// The central `crop` of the image.
private func cropped(_ image: Pixels) throws -> Pixels {
    guard let (height, width) = crop else { return image }
    guard image.width >= width, image.height >= height else {
        let size = "\(image.width)x\(image.height)"
        throw ImageError(description: "The image's \(size) pixels are fewer than the crop of \(width)x\(height).")
    }
    let left = Int((Double(image.width - width) / 2).rounded(.toNearestOrEven)) // as Python rounds
    let top = Int((Double(image.height - height) / 2).rounded(.toNearestOrEven))
    var values: [UInt8] = []
    for y in top..<top + height {
        let from = (y * image.width + left) * image.channels
        values += image.values[from..<from + width * image.channels]
    }
    return Pixels(width: width, height: height, channels: image.channels, values: values)
}
