import CoreML

/// The model's input for an image of the right size: an array.
public func input(_ image: Pixels) throws -> MLFeatureValue {
    let (shape, values) = normalized(image)
    return MLFeatureValue(multiArray: MLMultiArray(MLShapedArray<Float>(scalars: values, shape: shape)))
}
