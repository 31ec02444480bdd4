import CoreML
import Foundation

@testable import {{module}}

/// The golden samples: golden.json names the tensors; their values lie in files, sample after sample, little-endian.
struct Golden: Decodable {
    let samples: Int
    let inputs: [Tensor]
    let outputs: [Tensor]
    let images: Images?

    struct Images: Decodable {
        let step: Double
    }

    struct Tensor: Decodable {
        let name: String
        let type: String
        let shape: [Int]
        let file: String
        let tolerance: Double?

        /// The values of one sample.
        func numbers(_ sample: Int) throws -> [Double] {
            switch type {
            case "int32": return try stored(Int32.self, sample).map(Double.init)
            case "uint8": return try stored(UInt8.self, sample).map(Double.init)
            default: return try stored(Float.self, sample).map(Double.init)
            }
        }

        /// What the model is given for one sample.
        func feature(_ sample: Int) throws -> MLFeatureValue {
            switch type {{{pixel_case}}
            case "int32":
                let array = MLShapedArray<Int32>(scalars: try stored(Int32.self, sample), shape: shape)
                return MLFeatureValue(multiArray: MLMultiArray(array))
            default:
                let array = MLShapedArray<Float>(scalars: try stored(Float.self, sample), shape: shape)
                return MLFeatureValue(multiArray: MLMultiArray(array))
            }
        }

        func stored<Scalar>(_ kind: Scalar.Type, _ sample: Int) throws -> [Scalar] {
            let count = shape.reduce(1, *)
            let size = MemoryLayout<Scalar>.stride
            return try Golden.bytes(file).withUnsafeBytes { buffer in
                (0..<count).map { buffer.loadUnaligned(fromByteOffset: (sample * count + $0) * size, as: kind) }
            }
        }
    }

    static func read() throws -> Golden {
        try JSONDecoder().decode(Golden.self, from: bytes("golden.json"))
    }

    /// A file of the golden samples.
    static func bytes(_ name: String) throws -> Data {
        let folder = Bundle.module.url(forResource: "golden", withExtension: nil)!
        return try Data(contentsOf: folder.appendingPathComponent(name))
    }
}
