"""The notebooks as a person meets them: JupyterLab in a browser, every cell of every notebook."""

import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from jupyter_server.serverapp import list_running_servers

from llmlib import __main__ as workbook

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Chromium and chromedriver"),
]
PATIENCE = 600  # seconds for one notebook; only a hang takes as long
PANEL = ".widget-interact img"  # the figure beneath a panel's controls
RUN_AND_SAVE = """
const run = (command) => jupyterapp.commands.execute(command);
const notebook = jupyterapp.shell.currentWidget;
notebook.context.ready
  .then(() => notebook.sessionContext.ready)
  .then(() => run("notebook:run-all-cells"))
  .then(() => run("docmanager:save"))
  .then(() => window.outcome = "saved", (error) => window.outcome = String(error));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smoke_records):
    """The notebooks with the parameters of a test, and records: 05 trains anew, the rest reload."""
    folder = tmp_path_factory.mktemp("jupyterlab")
    shutil.copytree(smoke_records[0], folder / "runs")
    shutil.rmtree(folder / "runs" / "05_full_run")
    for stem in workbook.select(""):
        notebook = nbformat.read(workbook.NOTEBOOKS / f"{stem}.ipynb", as_version=4)
        [parameters] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        parameters.source += f'\nscale, runs_dir = "smoke", {str(folder / "runs")!r}'
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """The address of a running JupyterLab with fresh settings, with %s for a notebook."""
    options = {
        "ServerApp.root_dir": folder,
        "ServerApp.port": 0,  # any that is free
        "LabApp.expose_app_in_browser": True,
        "LabApp.news_url": None,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    places = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "RUNTIME")}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | places, stdout=log, stderr=log)
    try:
        while not (running := list(list_running_servers(folder / "RUNTIME"))):
            assert server.poll() is None, (folder / "lab.log").read_text()
            time.sleep(0.2)
        yield f"{running[0]['url']}lab/tree/%s.ipynb?reset&token={running[0]['token']}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    size = "--window-size=1400,9000"  # whole notebooks: what is out of sight is not drawn
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", size):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("stem", workbook.select(""))  # in order: each reads earlier records
def test_every_cell_runs_in_jupyterlab(lab, folder, browser, stem):
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(lab % stem)
    patience = WebDriverWait(browser, PATIENCE)
    is_open = "return window.jupyterapp?.shell.currentWidget?.context?.path === arguments[0]"
    patience.until(lambda page: page.execute_script(is_open, f"{stem}.ipynb"))
    browser.execute_script(RUN_AND_SAVE)
    assert patience.until(lambda page: page.execute_script("return window.outcome")) == "saved"
    notebook = nbformat.read(folder / f"{stem}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    n_panels = sum("_panel(" in cell.source for cell in cells)
    patience.until(lambda page: len(page.find_elements("css selector", PANEL)) == n_panels)
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors[0].traceback)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (folder / "runs" / stem / "summary.json").exists()
