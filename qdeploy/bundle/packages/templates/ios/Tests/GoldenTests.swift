import CoreML
import XCTest

@testable import {{module}}

final class GoldenTests: XCTestCase {
    func testGoldenSamplesComeOutAsTheyWereMeasured() async throws {
        let golden = try Golden.read()
        let model = try await Model()
        for sample in 0..<golden.samples {
            var inputs = [:] as [String: MLFeatureValue]
            for tensor in golden.inputs {
                inputs[tensor.name] = try tensor.feature(sample)
            }
            let found = try model.run(inputs)
            for output in golden.outputs {
                let expected = try output.numbers(sample)
                let difference = largestDifference(found[output.name]!, expected)
                let message = "\(output.name) of golden sample \(sample) is off by \(difference)"
                XCTAssertLessThanOrEqual(difference, output.tolerance!, message)
            }
        }
    }

    private func largestDifference(_ found: [Double], _ expected: [Double]) -> Double {
        guard found.count == expected.count else { return .infinity }
        // NaN on one side alone is within no tolerance.
        let differences = zip(found, expected).map { a, b in
            a == b || (a.isNaN && b.isNaN) ? 0 : (a - b).isNaN ? .infinity : abs(a - b)
        }
        return differences.max() ?? 0
    }
}
