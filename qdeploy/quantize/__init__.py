"""QuantPlan → QuantizedModel: QDQ through ONNX Runtime, and the lint that checks any model against a contract."""
