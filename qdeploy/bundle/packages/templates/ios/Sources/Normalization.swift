// How pixels become the model's input: x = (pixel * scale - mean) / std.
private let color = "{{color}}" // order of the channels: rgb, bgr or gray
private let layout = "{{layout}}" // order of the axes: nchw or nhwc
private let scale: Float = {{scale}} // factor on pixel values from 0 to 255
private let mean: [Float] = [{{mean}}] // one number, or one a channel
private let std: [Float] = [{{std}}]

/// The shape of the model's input for an image of the right size, and its values.
public func normalized(_ image: Pixels) -> (shape: [Int], values: [Float]) {
    let area = image.width * image.height
    let channels = image.channels
    var values = [Float](repeating: 0, count: area * channels)
    for i in 0..<area {
        for channel in 0..<channels {
            let pixel = Float(image.values[i * channels + (color == "bgr" ? channels - 1 - channel : channel)])
            let to = layout == "nchw" ? channel * area + i : i * channels + channel
            values[to] = (pixel * scale - mean[channel % mean.count]) / std[channel % std.count]
        }
    }
    let nchw = [1, channels, image.height, image.width]
    return (layout == "nchw" ? nchw : [1, image.height, image.width, channels], values)
}
