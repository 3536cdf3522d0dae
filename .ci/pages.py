"""Makes the repository's own files the pages of the documentation, at the same paths, so that links work in both.

The site loads nothing from elsewhere; the build fails if a page does.
"""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.append(str(Path(__file__).parent))
import offline

PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/*.png",
    "docs/*.svg",
    "docs/site/**/*.*",
    "docs/site/*/LICENSE",
    "benchmarks/*.md",
    "notebooks/*.ipynb",
)

# What the notebooks' template loads: MathJax, in whose place `docs/site` has KaTeX; Mermaid, which no notebook uses.
FROM_ELSEWHERE = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->"
    r"|<script type=\"module\">(?:(?!</script>).)*mermaid.*?</script>",
    re.DOTALL,
)


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs_dir by PAGES."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    root = Path(config.config_file_path).parent
    for path in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page without what it would load from elsewhere."""
    return FROM_ELSEWHERE.sub("", html) if page.file.src_uri.endswith(".ipynb") else html


def on_post_build(config: MkDocsConfig) -> None:
    """Stop where a page loads something that does not come with the site."""
    if faults := offline.faults(Path(config.site_dir)):
        raise PluginError("\n".join(faults))
