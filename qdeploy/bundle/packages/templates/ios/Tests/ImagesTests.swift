import XCTest

@testable import {{module}}

final class ImagesTests: XCTestCase {
    /// Decoders of JPEG may differ by a step here and there; another resize or order of channels differs by many.
    func testGoldenImagesBecomeTheInputsThatWereMeasured() throws {
        let golden = try Golden.read()
        for sample in 0..<golden.samples {
            let image = try sized(pixels(decoded(Golden.bytes("image-\(sample)"))))
            let found = {{values}}
            let differences = try zip(found, golden.inputs[0].numbers(sample)).map { abs(Double($0) - $1) }
            let mean = differences.reduce(0, +) / Double(found.count) / golden.images!.step
            XCTAssertLessThanOrEqual(mean, 1, "Golden image \(sample) is off by \(mean) steps of a pixel on average")
        }
    }
}
