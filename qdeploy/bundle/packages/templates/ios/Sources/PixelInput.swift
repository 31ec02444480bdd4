import CoreML
import CoreVideo

/// The model's input for an image of the right size: pixels, which the model itself scales.
public func input(_ image: Pixels) throws -> MLFeatureValue {
    let format = image.channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
    var created: CVPixelBuffer?
    CVPixelBufferCreate(kCFAllocatorDefault, image.width, image.height, format, nil, &created)
    guard let buffer = created else { throw ImageError(description: "There is no memory for the pixels.") }
    CVPixelBufferLockBaseAddress(buffer, [])
    defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
    let bytes = CVPixelBufferGetBaseAddress(buffer)!.assumingMemoryBound(to: UInt8.self)
    for y in 0..<image.height {
        let row = bytes + y * CVPixelBufferGetBytesPerRow(buffer)
        for x in 0..<image.width {
            let from = (y * image.width + x) * image.channels
            if image.channels == 1 {
                row[x] = image.values[from]
            } else {
                (row[4 * x], row[4 * x + 1]) = (image.values[from + 2], image.values[from + 1])
                (row[4 * x + 2], row[4 * x + 3]) = (image.values[from], 255)
            }
        }
    }
    return MLFeatureValue(pixelBuffer: buffer)
}
