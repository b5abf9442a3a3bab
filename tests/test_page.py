"""The server's page in a browser: what it shows, that it stays live, to whom it is readable, and that it asks nobody else.

It takes Chrome and its driver, or Debian's packages `chromium` and `chromium-driver`.
"""

import json
import os
import shutil
import signal

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from test_server import DEADLINE, KEY, TOKEN, World, complete, of_one, serving

COLUMNS = ["Name", "Method", "Rank", "Memory", "As LoRA of that rank", "Requests", "State"]
LONG = "a" * 64
MARKUP = "<b>bold</b>"
QUIET = (  # a browser has errands of its own
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# Every text: WCAG's contrast of its colour with what is behind it.
CONTRASTS = """
const channels = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].reduce((sum, c, i) => {
  c /= 255;
  return sum + [0.2126, 0.7152, 0.0722][i] * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
}, 0);
const behind = node => {
  for (; node; node = node.parentElement) {
    const color = channels(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
for (let node; (node = walker.nextNode());) {
  const box = node.parentElement;
  if (!node.data.trim() || !box.checkVisibility()) continue;
  const [a, b] = [light(channels(getComputedStyle(box).color)), light(behind(box))].sort((x, y) => y - x);
  found[node.data] = (a + 0.05) / (b + 0.05);
}
return found;
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    programs = shutil.which("google-chrome") or shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        why = "there is no browser with a driver: apt-get install chromium chromium-driver fonts-dejavu-core"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")  # 64 MB in a container
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    if os.geteuid() == 0:  # its sandbox refuses root
        options.add_argument("--no-sandbox")
    for argument in QUIET:
        options.add_argument(argument)
    with webdriver.Chrome(options, Service(programs[1])) as driver:
        yield driver


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


class Page:
    """The page at an address, in a window that is 1280 CSS pixels wide, or another."""

    def __init__(self, driver, address):
        self.driver = driver
        self.window(1280)
        self.logs()  # those of the page before
        driver.get(address)

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def window(self, width, scheme="light"):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def script(self, code):
        return self.driver.execute_script(code)

    def text(self, id):
        return self.driver.find_element(By.ID, id).text

    def rows(self, part="body"):
        """Texts of the cells, of a row after the other; in one step, since rows come and go."""
        return self.script(
            f"return [...document.querySelectorAll('t{part} tr')].map(r => [...r.cells].map(c => c.innerText))"
        )

    def until(self, condition):
        WebDriverWait(self.driver, DEADLINE, 0.05).until(lambda _: condition())

    def until_shown(self, id, text):
        self.until(lambda: self.text(id) == text)

    def logs(self):
        """What the console says of errors, and every address that was asked for, since the last time."""
        errors = [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        return errors, [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def roles(self):
        """(role, name) of all that a screen reader is told."""
        nodes = self.cdp("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]


def running(page, adapters):
    page.until_shown("state", f"running, {adapters} adapter{'' if adapters == 1 else 's'}")


@pytest.fixture
def served(world, tmp_path):
    """A server of red and green, with a directory of one more, and its client that may change adapters."""
    shutil.copytree(world.adapters / "lora", tmp_path / "lora")
    limits = {"adapters": ("red", "green"), "capacity": 4 * of_one(world)}
    with (
        serving(world, tmp_path, limits, admin_token=TOKEN) as (service, address, _),
        httpx.Client(base_url=address, timeout=DEADLINE, headers={"authorization": f"Bearer {TOKEN}"}) as http,
    ):
        yield service, http


@pytest.fixture
def page(driver, served):
    """The page; afterwards, nothing was wrong with it and nobody else was asked."""
    address = str(served[1].base_url)
    page = Page(driver, address)
    running(page, 2)
    yield page
    errors, asked = page.logs()
    assert errors == []
    assert {url.removeprefix(address) for url in asked} - {"data:,"} == {"/", "/v1/adapters"}


def shown(n):
    """Bytes as the page writes them; here they are few."""
    return f"{n / 1024:.1f} KiB"


def test_it_shows_the_adapters_and_their_memory(page, served):
    report = served[1].get("/v1/adapters").json()
    assert page.driver.title == "base - mos_ext server"
    assert page.text("base") == "base"
    assert page.rows("head") == [COLUMNS]
    expected = [
        [a["name"], "MoS", str(a["r"]), shown(a["bytes"]), shown(a["lora_bytes"]), "0", "in memory"]
        for a in report["data"]
    ]
    assert [row[0] for row in expected] == ["red", "green"]
    assert page.rows() == expected
    memory, whole = report["memory"], [sum(a[what] for a in report["data"]) for what in ("bytes", "lora_bytes")]
    assert page.rows("foot") == [["Together", "", "", *map(shown, whole), "0", ""]]
    assert page.text("used") == shown(memory["used"])
    assert page.text("capacity") == f"of {shown(memory['capacity'])}"
    width = page.script("return fill.clientWidth / full.clientWidth")
    assert width == pytest.approx(memory["used"] / memory["capacity"], abs=0.02)
    assert page.text("rows") == "4"
    assert page.text("none") == ""


def test_an_answer_is_seen_at_once(world, page, served):
    """Its tokens, their speed, and where they went: without another load of the page."""
    page.script("window.stayed = true")
    assert [page.text(id) for id in ("answered", "rate", "peak")] == ["0", "0", "0"]
    complete(served[1], "red", world.ids("I have"))
    page.until_shown("answered", "12")
    assert float(page.text("peak")) > 0
    assert page.script("return line.getBBox().height") > 10
    complete(served[1], "green", world.ids("I have"))
    page.until_shown("answered", "24")
    page.until_shown("rate", "0")  # nothing since
    assert float(page.text("peak")) > 0
    assert page.script("return window.stayed")


def test_adapters_come_and_go_on_it(page, served):
    service, http = served
    page.script("window.green = body.rows[1]; getSelection().selectAllChildren(green)")
    assert http.post("/v1/adapters", json={"name": "lora", "pin": True}).status_code == 201
    running(page, 3)
    assert [(row[0], row[-1]) for row in page.rows()] == [
        ("red", "in memory"),
        ("green", "in memory"),
        ("lora", "in memory, pinned"),
    ]
    assert http.delete("/v1/adapters/red").status_code == 200
    running(page, 2)
    assert [row[0] for row in page.rows()] == ["green", "lora"]
    assert page.script("return body.rows[0] === green && getSelection().containsNode(green, true)")  # for who copies it
    service.bank.evict("green")
    page.until(lambda: page.rows()[0][-1] == "evicted")
    for name in ("green", "lora"):
        service.bank.remove(name)
    running(page, 0)
    assert page.text("none") == "There are none; requests get the model alone."
    assert not page.driver.find_element(By.ID, "list").is_displayed()


def test_it_says_what_it_is_to_who_does_not_see_it(page):
    for width in (1280, 375):
        page.window(width)
        roles = page.roles()
        assert {"banner", "main", "status", "table"} <= {role for role, _ in roles}
        assert [name for role, name in roles if role == "heading"] == ["base", "Now", "Adapters"]
        assert [name for role, name in roles if role == "columnheader"] == COLUMNS
        assert [name for role, name in roles if role == "rowheader"] == ["red", "green", "Together"]
        assert {("table", "Adapters"), ("meter", "Memory of adapters in use")} <= set(roles)
        assert sum(role == "row" for role, _ in roles) == 4
        assert sum(role == "cell" for role, _ in roles) == 3 * 6


def test_it_is_read_by_day_and_by_night(page):
    for scheme, back in (("light", "rgb(244, 246, 249)"), ("dark", "rgb(16, 20, 27)")):
        page.window(1280, scheme)
        assert page.script("return getComputedStyle(document.body).backgroundColor") == back
        contrasts = page.script(CONTRASTS)
        assert {"base", "running, 2 adapters", "Memory", "red", "in memory", "Together", "0"} <= set(contrasts)
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}  # WCAG AA


def test_nothing_is_wider_than_the_window(world, page, served):
    for name in (LONG, MARKUP):
        served[0].bank.add(name, world.adapters / "lora")
    running(page, 4)
    assert [row[0] for row in page.rows()] == ["red", "green", LONG, MARKUP]
    for width in (1280, 900, 720, 375, 320):
        page.window(width)
        for node in ("document.documentElement", "list"):
            wide, room = page.script(f"return [{node}.scrollWidth, {node}.clientWidth]")
            assert wide <= room <= width


def test_it_asks_for_the_key(driver, world):
    with serving(world, api_key=KEY) as (_, address, _):
        page = Page(driver, address)
        page.until_shown("state", "an API key is needed")
        assert not driver.find_element(By.ID, "known").is_displayed()  # says nothing that it does not know
        field = driver.find_element(By.ID, "key")
        assert (field.aria_role, field.accessible_name, field.get_attribute("type")) == (
            "textbox",
            "API key",
            "password",
        )
        field.send_keys("wrong\n")
        page.until_shown("state", "this API key is not the server's")
        assert page.rows() == []
        field.clear()
        field.send_keys(KEY)
        driver.find_element(By.CSS_SELECTOR, "#ask button").click()
        running(page, 3)
        assert not field.is_displayed()
        assert driver.current_url == f"{address}/"
        errors, _ = page.logs()
        assert all("401" in error for error in errors)


def test_it_says_so_when_the_server_is_gone(driver, world):
    with serving(world) as (_, address, server):
        page = Page(driver, address)
        running(page, 3)
        assert page.script("return main.className") == ""
        server.handle_exit(signal.SIGTERM, None)
        page.until_shown("state", "the server does not answer")
        assert [driver.find_element(By.ID, id).get_attribute("class") for id in ("main", "state")] == ["stale", "bad"]
        assert len(page.rows()) == 3  # the last that was known
        driver.get("about:blank")  # asks no more
