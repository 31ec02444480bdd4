package {{namespace}}

import ai.onnxruntime.OnnxJavaType
import android.content.res.AssetManager
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.json.JSONObject

/** The golden samples: golden.json names the tensors; their values lie in files, sample after sample, little-endian. */
class Golden(private val assets: AssetManager) {
    private val content = JSONObject(String(file("golden.json")))
    val samples: Int = content.getInt("samples")
    val inputs: List<Tensor> = tensors("inputs")
    val outputs: List<Tensor> = tensors("outputs")
    val images: JSONObject? = content.optJSONObject("images")

    /** An input or output; [tolerance] is how far an output may be off. */
    inner class Tensor(entry: JSONObject) {
        val name: String = entry.getString("name")
        val type: OnnxJavaType = OnnxJavaType.valueOf(entry.getString("type"))
        val shape: LongArray = entry.getJSONArray("shape").let { sizes -> LongArray(sizes.length()) { sizes.getLong(it) } }
        val tolerance: Double = entry.optDouble("tolerance")
        private val values = file(entry.getString("file"))

        /** The bytes of one sample. */
        fun sample(index: Int): ByteBuffer {
            val size = values.size / samples
            return ByteBuffer.wrap(values.copyOfRange(index * size, (index + 1) * size))
        }
    }

    /** A file of the golden samples. */
    fun file(name: String): ByteArray = assets.open("golden/$name").use { it.readBytes() }

    private fun tensors(part: String): List<Tensor> {
        val entries = content.getJSONArray(part)
        return List(entries.length()) { Tensor(entries.getJSONObject(it)) }
    }
}

/** The values in the bytes of a tensor. */
fun numbers(bytes: ByteBuffer, type: OnnxJavaType): List<Double> {
    val little = bytes.order(ByteOrder.LITTLE_ENDIAN)
    return List(little.capacity() / type.size) {
        when (type) {
            OnnxJavaType.FLOAT -> little.getFloat(4 * it).toDouble()
            OnnxJavaType.DOUBLE -> little.getDouble(8 * it)
            OnnxJavaType.INT64 -> little.getLong(8 * it).toDouble()
            OnnxJavaType.INT32 -> little.getInt(4 * it).toDouble()
            OnnxJavaType.UINT8 -> (little.get(it).toInt() and 255).toDouble()
            else -> little.get(it).toDouble()
        }
    }
}
