"""The Triton example does what its README says, on a real server."""

import pytest

from tests.docs.test_docs import ROOT, blocks, is_run, run_console

README = ROOT / "deploy_examples" / "04_triton" / "README.md"


@pytest.mark.slow
def test_the_readmes_commands_serve_verify_and_ask(serve, tmp_path):
    (tmp_path / "deploy_examples").symlink_to(ROOT / "deploy_examples")
    export, package, *asking = [block.text for block in blocks(README) if is_run(block)]

    run_console(export, tmp_path)
    run_console(package, tmp_path)
    with serve(tmp_path / "out" / "models", tmp_path / "triton.log") as server:
        for text in asking:
            http, grpc = (url.rpartition(":")[2] for url in (server.http, server.grpc))
            run_console(
                text.replace("localhost:8000", f"localhost:{http}").replace("localhost:8001", f"localhost:{grpc}"),
                tmp_path,
            )
    assert len(asking) == 2
