package {{namespace}}

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtSession
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import java.nio.FloatBuffer

/** The outputs for an image; close them once they are read. */
fun Model.run(image: Bitmap): OrtSession.Result {
    val input = prepared(pixels(image))
    return OnnxTensor.createTensor(environment, FloatBuffer.wrap(input.values), input.shape).use {
        run(mapOf({{input}} to it))
    }
}

/** An image file as it is stored: in its own size, not turned as its EXIF data ask, colors not mixed with alpha. */
fun decoded(file: ByteArray): Bitmap {
    val options = BitmapFactory.Options().apply { inPremultiplied = false }
    return requireNotNull(BitmapFactory.decodeByteArray(file, 0, file.size, options)) { "Android cannot decode this." }
}

/** The pixels of a bitmap in the colors that the model takes. */
fun pixels(image: Bitmap): Pixels {
    val row = IntArray(image.width)
    return pixels(image.width, image.height) { y ->
        image.getPixels(row, 0, image.width, 0, y, image.width, 1)
        row
    }
}
