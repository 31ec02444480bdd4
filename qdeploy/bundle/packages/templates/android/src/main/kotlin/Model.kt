package {{namespace}}

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.content.Context

/** The model on ONNX Runtime's CPU provider. Load it once, off the main thread; several threads may run it. */
class Model(context: Context) : AutoCloseable {
    val environment: OrtEnvironment = OrtEnvironment.getEnvironment()
    private val session: OrtSession =
        environment.createSession(context.assets.open("{{module}}/model.ort").use { it.readBytes() })

    /** The outputs, by name. Close them once they are read; the inputs stay the caller's. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = session.run(inputs)

    override fun close() = session.close()
}
