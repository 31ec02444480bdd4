package {{namespace}}

import ai.onnxruntime.OnnxTensor
import androidx.test.ext.junit.runners.AndroidJUnit4
import androidx.test.platform.app.InstrumentationRegistry
import kotlin.math.abs
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith

@RunWith(AndroidJUnit4::class)
class GoldenTest {
    private val instrumentation = InstrumentationRegistry.getInstrumentation()
    private val golden = Golden(instrumentation.context.assets)

    @Test
    fun goldenSamplesComeOutAsTheyWereMeasured() {
        Model(instrumentation.targetContext).use { model ->
            for (sample in 0 until golden.samples) compare(model, sample)
        }
    }

    private fun compare(model: Model, sample: Int) {
        val inputs = golden.inputs.associate {
            it.name to OnnxTensor.createTensor(model.environment, it.sample(sample), it.shape, it.type)
        }
        model.run(inputs).use { result ->
            for (output in golden.outputs) {
                val found = result.get(output.name).get() as OnnxTensor
                val expected = numbers(output.sample(sample), output.type)
                val difference = largestDifference(numbers(found.byteBuffer, found.info.type), expected)
                val message = "${output.name} of golden sample $sample is off by $difference"
                assertTrue("$message, more than ${output.tolerance}", difference <= output.tolerance)
            }
        }
        inputs.values.forEach { it.close() }
    }

    private fun largestDifference(found: List<Double>, expected: List<Double>): Double {
        assertEquals(expected.size, found.size)
        // What equals itself, NaN too, is no difference; NaN on one side alone is within no tolerance.
        return found.zip(expected).maxOf { (a, b) -> if (a.compareTo(b) == 0) 0.0 else abs(a - b) }
    }
}
