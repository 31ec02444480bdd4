package {{namespace}}

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min
import kotlin.math.round

// How the pixels of an image become the model's input: x = (pixel * SCALE - MEAN) / STD.
private val RESIZE: Int? = {{resize}} // pixels of the shorter side, bilinear, aspect kept; null leaves the size
private val CROP: Pair<Int, Int>? = {{crop}} // height and width of the central rectangle; null keeps all
private const val COLOR = "{{color}}" // order of the channels: rgb, bgr or gray
private const val LAYOUT = "{{layout}}" // order of the axes: nchw or nhwc
private const val SCALE = {{scale}} // factor on pixel values from 0 to 255
private val MEAN = floatArrayOf({{mean}}) // one number, or one a channel
private val STD = floatArrayOf({{std}})

/** Values from 0 to 255, row by row, each pixel with its channels: red, green and blue, or gray alone. */
class Pixels(val width: Int, val height: Int, val channels: Int, val values: ByteArray)

/** An input of the model: a batch of one. */
class Input(val shape: LongArray, val values: FloatArray)

/** The model's input for an image. */
fun prepared(image: Pixels): Input = normalized(cropped(resized(image)))

/** The pixels of an image of which [row] gives each line in Android's colors, 0xAARRGGBB; alpha is dropped. */
fun pixels(width: Int, height: Int, row: (Int) -> IntArray): Pixels {
    val channels = if (COLOR == "gray") 1 else 3
    val values = ByteArray(width * height * channels)
    var end = 0
    for (y in 0 until height) {
        for (color in row(y)) {
            val red = color shr 16 and 255
            val green = color shr 8 and 255
            val blue = color and 255
            if (channels == 1) {
                values[end++] = (19595 * red + 38470 * green + 7471 * blue + 32768 shr 16).toByte() // ITU-R 601-2
            } else {
                values[end++] = red.toByte()
                values[end++] = green.toByte()
                values[end++] = blue.toByte()
            }
        }
    }
    return Pixels(width, height, channels, values)
}

/** The image with its shorter side RESIZE pixels long; the longer one is rounded down. */
private fun resized(image: Pixels): Pixels {
    val length = RESIZE ?: return image
    val shorter = min(image.width, image.height)
    val width = (length.toLong() * image.width / shorter).toInt()
    val height = (length.toLong() * image.height / shorter).toInt()
    val values =
        if (image.height - height > max(0, 2 * (image.width - width))) { // then Pillow 13 begins with the height
            val low = resampled(image.values, 1, image.height, image.width * image.channels, height)
            resampled(low, height, image.width, image.channels, width)
        } else {
            val narrow = resampled(image.values, image.height, image.width, image.channels, width)
            resampled(narrow, 1, image.height, width * image.channels, height)
        }
    return Pixels(width, height, image.channels, values)
}

/**
 * The middle axis of [outer, size, inner] brought to another length, as Pillow does it: each value is a mean of those
 * below a triangle as wide as two steps, rounded to a whole number. Android's own scaling skips pixels instead.
 */
private fun resampled(values: ByteArray, outer: Int, size: Int, inner: Int, length: Int): ByteArray {
    val step = size.toDouble() / length
    val reach = max(step, 1.0)
    val result = ByteArray(outer * length * inner)
    for (position in 0 until length) {
        val center = (position + 0.5) * step
        val first = max((center - reach + 0.5).toInt(), 0)
        val weights = triangle(first, min((center + reach + 0.5).toInt(), size), center, reach)
        for (i in 0 until outer) {
            for (j in 0 until inner) {
                var sum = HALF
                for (k in weights.indices) {
                    sum += weights[k] * (values[(i * size + first + k) * inner + j].toInt() and 255)
                }
                result[(i * length + position) * inner + j] = (sum shr BITS).toByte()
            }
        }
    }
    return result
}

private const val BITS = 22
private const val HALF = 1 shl BITS - 1

/** Weights of the places from first to last, whose sum is 1, in steps of 2^-BITS. */
private fun triangle(first: Int, last: Int, center: Double, reach: Double): IntArray {
    val heights = DoubleArray(last - first) { max(0.0, 1.0 - abs((first + it - center + 0.5) * (1.0 / reach))) }
    val sum = heights.sum()
    return IntArray(heights.size) { (heights[it] / sum * (1 shl BITS) + 0.5).toInt() }
}

/** The central CROP of the image. */
private fun cropped(image: Pixels): Pixels {
    val (height, width) = CROP ?: return image
    require(image.width >= width && image.height >= height) {
        "The image's ${image.width}x${image.height} pixels are fewer than the crop of ${width}x$height."
    }
    val left = round((image.width - width) / 2.0).toInt() // to even, as Python rounds
    val top = round((image.height - height) / 2.0).toInt()
    val line = width * image.channels
    val values = ByteArray(height * line)
    for (y in 0 until height) {
        val from = ((top + y) * image.width + left) * image.channels
        image.values.copyInto(values, y * line, from, from + line)
    }
    return Pixels(width, height, image.channels, values)
}

private fun normalized(image: Pixels): Input {
    val area = image.width * image.height
    val channels = image.channels
    val values = FloatArray(area * channels)
    for (i in 0 until area) {
        for (channel in 0 until channels) {
            val from = if (COLOR == "bgr") channels - 1 - channel else channel
            val pixel = (image.values[i * channels + from].toInt() and 255).toFloat()
            val to = if (LAYOUT == "nchw") channel * area + i else i * channels + channel
            values[to] = (pixel * SCALE - MEAN[channel % MEAN.size]) / STD[channel % STD.size]
        }
    }
    val (c, h, w) = longArrayOf(channels.toLong(), image.height.toLong(), image.width.toLong())
    return Input(if (LAYOUT == "nchw") longArrayOf(1, c, h, w) else longArrayOf(1, h, w, c), values)
}
