// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "{{module}}",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "{{module}}", targets: ["{{module}}"])],
    targets: [
        .target(name: "{{module}}", path: "Sources", resources: [.copy("model.mlpackage")]),{{test_target}}
    ]
)
