//! The report's page in a real browser: numbers as in the JSON, nothing beyond the edge of a phone, text that can be read
//! in light and dark, nothing on the console, nothing from names of files executed.
//!
//! The browser is `OSTQ_BROWSER`, else chromium or google-chrome of the PATH; without one these tests skip with a line on
//! stderr, or fail if `OSTQ_REQUIRE_BROWSER=1`. What needs no browser is tested without one.

#[path = "common/report.rs"]
mod made_up;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use made_up::synthetic;
use ostq_convert::check::report::Report;
use serde_json::Value as Json;

fn browser() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("OSTQ_BROWSER").filter(|v| !v.is_empty()) {
        return Some(path.into());
    }
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let found = names.iter().find_map(|n| folders.iter().map(|f| f.join(n)).find(|p| p.is_file()));
    if found.is_none() {
        let missing = "no chromium or google-chrome (set OSTQ_BROWSER)";
        assert!(std::env::var_os("OSTQ_REQUIRE_BROWSER").is_none_or(|v| v != "1"), "{missing}");
        eprintln!("SKIPPED: {missing}");
    }
    found
}

/// The DOM of a page after its scripts ran, and what it said on the console.
fn open(browser: &Path, dir: &Path, page: &str, flags: &[&str]) -> (String, Vec<String>) {
    let file = dir.join("page.html");
    std::fs::write(&file, page).unwrap();
    let (out, log) = (dir.join("out"), dir.join("log"));
    let mut command = Command::new(browser);
    command.args([
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--dump-dom",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
    ]);
    command.arg(format!("--user-data-dir={}", dir.join("profile").display())).args(flags);
    if std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0) {
        // Chromium refuses to run as root with it
        command.arg("--no-sandbox");
    }
    command.arg(format!("file://{}", file.display())).stdin(Stdio::null());
    let mut child = command.stdout(File::create(&out).unwrap()).stderr(File::create(&log).unwrap()).spawn().unwrap();
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > Duration::from_secs(120) => {
                let _ = child.kill();
                panic!("{} did not end in two minutes", browser.display());
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let text = |p: &Path| String::from_utf8_lossy(&std::fs::read(p).unwrap()).into_owned();
    let log = text(&log);
    assert!(status.success(), "{}: {status}\n{log}", browser.display());
    let console = log.lines().filter(|l| l.contains("CONSOLE")).map(String::from).collect();
    (text(&out), console)
}

/// Shows a page in a frame of `WIDTH` and writes down what is found in it.
const PROBE: &str = r##"<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="width:WIDTHpx;height:900px;border:0" srcdoc="PAGE"></iframe><pre id="result"></pre><script>
const frame = document.getElementById('f');
frame.addEventListener('load', () => {
  const d = frame.contentDocument, w = frame.contentWindow, root = d.documentElement;
  for (const e of d.querySelectorAll('details')) e.open = true;
  const rgb = s => (s.match(/[\d.]+/g) || []).map(Number);
  const lum = c => { const l = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(w.getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const wide = [], faint = [], small = [];
  let texts = 0;
  for (const e of d.body.querySelectorAll('*')) {
    const r = e.getBoundingClientRect();
    if (r.right > root.clientWidth + 0.5 && !e.closest('.scroll')) wide.push(e.outerHTML.slice(0, 120));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.closest('title') || r.width === 0) continue;
    texts++;
    const style = w.getComputedStyle(e), inSvg = e.namespaceURI.endsWith('svg');
    const a = lum(rgb(inSvg ? style.fill : style.color)), b = lum(ground(e));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) faint.push(contrast.toFixed(2) + ' ' + e.outerHTML.slice(0, 120));
    const svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    if (parseFloat(style.fontSize) * scale < 9) small.push(scale.toFixed(2) + ' ' + e.outerHTML.slice(0, 120));
  }
  const cut = [];
  for (const t of d.querySelectorAll('svg.chart text')) {
    const r = t.getBoundingClientRect(), s = t.closest('svg').getBoundingClientRect();
    if (r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1) cut.push(t.outerHTML);
  }
  const result = { dark: w.matchMedia('(prefers-color-scheme: dark)').matches, client: root.clientWidth, scroll: root.scrollWidth,
    texts, wide, faint, small, cut, scripts: d.querySelectorAll('script').length,
    fetched: d.querySelectorAll('[src],[href],link,object,embed,iframe').length,
    charts: d.querySelectorAll('svg.chart').length, titles: d.querySelectorAll('svg title').length,
    numbers: [...d.querySelectorAll('[data-path]')].map(e => [e.dataset.path, e.dataset.value]) };
  document.getElementById('result').textContent =
    JSON.stringify(result).replace(/[<>&]/g, c => '\\u00' + c.charCodeAt(0).toString(16));
});
</script>"##;

fn probe(browser: &Path, html: &str, width: u32, flags: &[&str]) -> Json {
    let dir = tempfile::tempdir().unwrap();
    let page = html.replace('&', "&amp;").replace('"', "&quot;");
    let page = PROBE.replace("WIDTH", &width.to_string()).replace("PAGE", &page);
    let (dom, console) = open(browser, dir.path(), &page, flags);
    assert_eq!(console, Vec::<String>::new());
    let result = dom.rsplit_once("<pre id=\"result\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let result = result.unwrap_or_else(|| panic!("no result in the page"));
    serde_json::from_str(result.0).unwrap_or_else(|e| panic!("{e}: the probe did not end: {}", result.0))
}

/// Every number below `at` of the JSON, as it is printed there.
fn numbers(value: &Json, at: String, all: &mut BTreeMap<String, String>) {
    match value {
        Json::Number(n) => drop(all.insert(at, n.to_string())),
        Json::Array(list) => list.iter().enumerate().for_each(|(i, v)| numbers(v, format!("{at}/{i}"), all)),
        Json::Object(map) => map.iter().for_each(|(k, v)| numbers(v, format!("{at}/{k}"), all)),
        _ => {}
    }
}

/// The page's numbers are those of the JSON, and none of the JSON that matters is missing.
fn assert_same_numbers(report: &Report, shown: &[(String, String)]) {
    let mut all = BTreeMap::new();
    numbers(&serde_json::from_str(&report.json()).unwrap(), String::new(), &mut all);
    for (path, value) in shown {
        assert_eq!(all.get(path), Some(value), "{path}");
    }
    let shown: BTreeSet<&str> = shown.iter().map(|(path, _)| path.as_str()).collect();
    let wanted = |path: &str, value: &str| {
        path.contains("/summary/") && !path.ends_with("/positions")
            || path.contains("/tensors/") && !path.ends_with("/layer")
            || path.ends_with("/relative_difference")
            || path.ends_with("/kld")
            || path.contains("/counts/") && value != "0"
            || path.starts_with("/run/") && ["n_ctx", "n_chunks", "n_vocab", "size"].iter().any(|k| path.ends_with(k))
    };
    // the error of a figure whose error is 0 has nothing to show
    let missing: Vec<_> = all
        .iter()
        .filter(|(p, v)| wanted(p, v) && !shown.contains(p.as_str()) && !(p.ends_with("/error") && *v == "0.0"))
        .collect();
    assert!(missing.is_empty(), "{} are not shown, {:?}", missing.len(), &missing[..missing.len().min(5)]);
}

fn pairs(result: &Json) -> Vec<(String, String)> {
    let text = |v: &Json| v.as_str().unwrap().to_string();
    result["numbers"].as_array().unwrap().iter().map(|p| (text(&p[0]), text(&p[1]))).collect()
}

#[test]
fn the_page_in_a_browser() {
    let Some(browser) = browser() else { return };
    let report = synthetic(6);
    let html = report.html();
    let mut modes = BTreeSet::new();
    for (width, flags) in [(400, &[][..]), (1280, &[]), (768, &[]), (400, &["--blink-settings=preferredColorScheme=0"])]
    {
        let seen = probe(&browser, &html, width, flags);
        let dark = seen["dark"].as_bool().unwrap();
        modes.insert(dark);
        let what = format!("{width} px, {}", if dark { "dark" } else { "light" });
        assert_eq!(
            (seen["client"].as_u64(), seen["scroll"].as_u64()),
            (Some(width.into()), Some(width.into())),
            "{what}"
        );
        for key in ["wide", "faint", "small", "cut"] {
            assert_eq!(seen[key], Json::Array(vec![]), "{what}: {key}");
        }
        for key in ["scripts", "fetched"] {
            assert_eq!(seen[key], 0, "{what}: {key}");
        }
        assert!(seen["texts"].as_u64() > Some(1000), "{what}: {}", seen["texts"]);
        assert!(seen["charts"].as_u64() >= Some(19) && seen["titles"].as_u64() > Some(1000), "{what}");
        assert_same_numbers(&report, &pairs(&seen));
    }
    if modes.len() < 2 {
        eprintln!("SKIPPED: this browser does not switch to dark by --blink-settings=preferredColorScheme=0");
    }
    // one model, and none of the optional parts
    let mut bare = synthetic(1);
    bare.models[0].tensors.clear();
    bare.models[0].blocks.clear();
    bare.run.reference_perplexity = None;
    let seen = probe(&browser, &bare.html(), 400, &[]);
    assert_eq!((&seen["scroll"], &seen["charts"]), (&Json::from(400), &Json::from(2)));
    assert_same_numbers(&bare, &pairs(&seen));
}

#[test]
fn the_probe_finds_what_it_looks_for() {
    let Some(browser) = browser() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (_, console) = open(&browser, dir.path(), "<script>console.error('to be seen')</script>", &[]);
    assert!(console.iter().any(|l| l.contains("to be seen")), "{console:?}");
    let bad = "<!doctype html><body style='margin:0'><div style='width:500px;color:#999;font-size:8px'>faint</div>\
               <svg class='chart' viewBox='0 0 100 20'><text x='90' y='10'>cut off here</text></svg>\
               <script src='x.js'></script><p data-path='/a' data-value='1'>";
    let seen = probe_without_console(&browser, bad);
    assert!(seen["scroll"].as_u64() >= Some(500) && seen["client"] == 400);
    for key in ["wide", "faint", "small", "cut"] {
        assert!(!seen[key].as_array().unwrap().is_empty(), "{key}");
    }
    assert_eq!((&seen["scripts"], &seen["fetched"]), (&Json::from(1), &Json::from(1)));
    assert_eq!(pairs(&seen), [("/a".to_string(), "1".to_string())]);
}

/// [`probe`] of a page that may complain.
fn probe_without_console(browser: &Path, html: &str) -> Json {
    let dir = tempfile::tempdir().unwrap();
    let page = html.replace('&', "&amp;").replace('"', "&quot;");
    let (dom, _) = open(browser, dir.path(), &PROBE.replace("WIDTH", "400").replace("PAGE", &page), &[]);
    let result = dom.rsplit_once("<pre id=\"result\">").and_then(|(_, rest)| rest.split_once("</pre>")).unwrap().0;
    serde_json::from_str(result).unwrap()
}

#[test]
fn the_page_without_a_browser() {
    let report = synthetic(6);
    let html = report.html();
    let numbers: Vec<(String, String)> = html
        .split("data-path=\"")
        .skip(1)
        .map(|rest| {
            let (path, rest) = rest.split_once("\" data-value=\"").unwrap();
            (path.to_string(), rest.split_once('"').unwrap().0.to_string())
        })
        .collect();
    assert_same_numbers(&report, &numbers);
    assert!(!html.contains("<script") && !html.contains("<b>copy") && !html.contains("http"));
    assert_eq!(html.matches("</style>").count(), 1);
    assert_eq!(html, synthetic(6).html(), "the same report gives the same bytes");
    // the reference alone
    let alone = synthetic(0);
    assert!(alone.html().contains("16.445") && alone.text().contains("16.445"));
    // other figures, other page: the comparison above can fail
    let mut other = report.clone();
    other.models[2].summary.kld.value *= 1.0 + 1e-15;
    assert!(std::panic::catch_unwind(|| assert_same_numbers(&other, &numbers)).is_err());
}

#[test]
fn json_comes_back_and_has_its_documented_keys() {
    let report = synthetic(6);
    let text = report.json();
    // serde_json reads floats to the last bit but one, so the text is compared
    let parsed: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string_pretty(&parsed).unwrap() + "\n", text);
    let back: Report = serde_json::from_str(&text).unwrap();
    assert_eq!(back.models.len(), report.models.len());
    for (a, b) in back.models.iter().zip(&report.models) {
        assert_eq!((&a.file, &a.histogram, a.tensors.len()), (&b.file, &b.histogram, b.tensors.len()));
        assert!((a.summary.kld.value - b.summary.kld.value).abs() <= 1e-15 * b.summary.kld.value);
    }
    assert_eq!(report.problems(), Vec::<String>::new());
    // every key stands in the documentation
    let docs = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/check.md")).unwrap();
    fn keys(value: &Json, all: &mut BTreeSet<String>) {
        match value {
            Json::Array(list) => list.iter().for_each(|v| keys(v, all)),
            Json::Object(map) => map.iter().for_each(|(k, v)| {
                all.insert(k.clone());
                keys(v, all);
            }),
            _ => {}
        }
    }
    let mut all = BTreeSet::new();
    keys(&parsed, &mut all);
    assert!(all.len() > 50, "{}", all.len());
    let missing: Vec<_> = all.iter().filter(|k| !docs.contains(&format!("`{k}`"))).collect();
    assert!(missing.is_empty(), "docs/check.md has not: {missing:?}");
    // NaN is found before it becomes null
    let mut broken = report;
    broken.models[1].tensors[3].relative_error = f64::NAN;
    broken.models[0].summary.kld.value = f64::INFINITY;
    assert_eq!(broken.problems().len(), 2);
}

#[test]
fn the_text_has_every_model_and_no_control_characters() {
    let mut report = synthetic(3);
    report.models[1].file.name = "a\u{1b}[31mred\nline".into();
    let text = report.text();
    assert!(!text.contains('\u{1b}') && text.contains("a\u{fffd}[31mred\u{fffd}line"));
    for name in ["Q8_0", "Q4_K_M", "Q4_0", "mean KLD", "Same top p", "largest relative errors"] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
    assert!(text.lines().all(|l| l.trim_end() == l));
}
