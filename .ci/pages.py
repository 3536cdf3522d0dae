"""Makes the repository's own files the pages of the documentation, at the same paths, so that links work in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "docs/*.png",
    "benchmarks/*.md",
    "notebooks/*.ipynb",
)


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs_dir by PAGES."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    root = Path(config.config_file_path).parent
    for path in sorted(path for pattern in PAGES for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files
