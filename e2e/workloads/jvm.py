"""A service on a JVM, Debian's OpenJDK with an embedded Tomcat: few files, large ones, read in places."""

from __future__ import annotations

import dataclasses

from e2e.workloads import debian, files
from e2e.workloads.recipe import Kitchen, Recipe
from glowplug.startup import machine

_PORT = 8000
_FOLDER = "srv"
_LIBRARIES = ("libtomcat10-java", "libtomcat10-embed-java", "libjackson2-databind-java", "libslf4j-java")
_JARS = (
    "tomcat10-embed-core",
    "tomcat10-embed-el",
    "tomcat10-annotations-api",
    "jackson-core",
    "jackson-annotations",
    "jackson-databind",
    "slf4j-api",
    "slf4j-simple",
)
_CLASS_PATH = ":".join((f"/{_FOLDER}", *(f"/usr/share/java/{name}.jar" for name in _JARS)))
_COMPILER = ("-cp", "/usr/share/java/eclipse-jdt-core.jar", "org.eclipse.jdt.internal.compiler.batch.Main")


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """The classes of one Java source, made by Eclipse's compiler, which runs on the image's own JVM."""

    source: files.Program
    class_path: str

    @property
    def title(self) -> str:
        """For people."""
        return f"classes of {self.source.title}"

    def apply(self, kitchen: Kitchen) -> None:
        """Compile; the source is no part of the image."""
        self.source.apply(kitchen)
        options = ("-17", "-proc:none", "-cp", self.class_path, "-d", f"/{_FOLDER}", f"/{self.source.path}")
        java = ("java", "-XX:-UsePerfData", *_COMPILER)
        with debian.proc(kitchen.root):
            machine.check_call(["chroot", str(kitchen.root), *java, *options])
        (kitchen.root / self.source.path).unlink()


RECIPE = Recipe(
    name="jvm",
    steps=(
        debian.Base(),
        debian.Packages(("openjdk-17-jre-headless",)),
        debian.Packages(_LIBRARIES),
        Compiled(files.program("Service.java", "tmp/Service.java"), _CLASS_PATH),
    ),
    command=("java", "-cp", _CLASS_PATH, "Service", str(_PORT)),
    note="downloads about 60 MB, then builds for a minute or two",
    url=f"http://127.0.0.1:{_PORT}/health",
)
