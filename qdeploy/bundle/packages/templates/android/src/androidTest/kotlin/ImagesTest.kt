package {{namespace}}

import androidx.test.ext.junit.runners.AndroidJUnit4
import androidx.test.platform.app.InstrumentationRegistry
import java.nio.ByteOrder
import kotlin.math.abs
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith

@RunWith(AndroidJUnit4::class)
class ImagesTest {
    private val golden = Golden(InstrumentationRegistry.getInstrumentation().context.assets)

    /** Decoders of JPEG may differ by a step here and there; another resize or order of channels differs by many. */
    @Test
    fun goldenImagesBecomeTheInputsThatWereMeasured() {
        val images = golden.images!!
        for (sample in 0 until golden.samples) {
            val input = prepared(pixels(decoded(golden.file("image-$sample")))).values
            val expected = golden.inputs.single().sample(sample).order(ByteOrder.LITTLE_ENDIAN)
            val differences = input.indices.map { abs(input[it] - expected.getFloat(4 * it)) }
            val mean = differences.average() / images.getDouble("step")
            assertTrue("Golden image $sample is off by $mean steps of a pixel on average", mean <= 1)
        }
    }
}
