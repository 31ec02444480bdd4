import CoreML
import Foundation

/// The model on Core ML. Load it once; several tasks may run it.
public final class Model {
    /// The names that the model's inputs and outputs have in the package.
    static let inputs = [{{input_names}}]
    static let outputs = [{{output_names}}]

    private let model: MLModel

    /// Compiles the package for this device, which takes a moment, and loads it.
    public init() async throws {
        let package = Bundle.module.url(forResource: "model", withExtension: "mlpackage")!
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .{{units}}
        let compiled = try await MLModel.compileModel(at: package)
        model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
    }

    /// The outputs by name, the values of each in row-major order; a classifier's in the order of its labels.
    public func run(_ inputs: [String: MLFeatureValue]) throws -> [String: [Double]] {
        let named = inputs.map { (Model.inputs[$0.key] ?? $0.key, $0.value) }
        let given = try MLDictionaryFeatureProvider(dictionary: Dictionary(uniqueKeysWithValues: named))
        let found = try model.prediction(from: given)
        return Model.outputs.mapValues { values(found.featureValue(for: $0)!) }
    }

    private func values(_ output: MLFeatureValue) -> [Double] {
        if let array = output.multiArrayValue {
            return MLShapedArray<Double>(converting: array).scalars
        }
        let labels = model.modelDescription.classLabels as! [String]
        return labels.map { output.dictionaryValue[$0]!.doubleValue }
    }
}
