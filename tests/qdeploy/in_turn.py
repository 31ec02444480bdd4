"""Workers without processes: what is shared, and how, is the same."""

from qdeploy.workers import Workers


class InTurn(Workers):
    """Does the parts itself, one after the other."""

    far = False
    threads = 1

    def __init__(self, count):
        self.count = count

    def run(self, task, on_step=lambda: None):
        return [task(part, on_step) for part in range(self.count)]


class FarInTurn(InTurn):
    """As if on a machine that sees other files."""

    far = True
