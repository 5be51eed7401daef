//! `--quality`: what each word stands for, the default, and what is refused.

mod common;

use std::path::Path;

use common::program::{Checkpoint, Tensor, command, fixture, run};

/// Converts the fixture with `args` where `OSTQ_QUALITY` says `otherwise`; the bytes, and standard output and error.
fn convert(out: &Path, otherwise: &str, args: &[&str]) -> (Vec<u8>, String) {
    let input = fixture("tiny");
    let mut c = command([&input, out]);
    c.args(args).args(["--force", "--no-provenance"]).env("OSTQ_QUALITY", otherwise);
    let ran = c.output().unwrap();
    let said = [&ran.stdout[..], &ran.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(ran.status.success(), "{args:?}: {said}");
    (std::fs::read(out).unwrap(), said)
}

#[test]
fn words_are_recipes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a.gguf");
    let exact = convert(&out, "balanced", &["--exact"]).0;
    assert!(convert(&out, "balanced", &["--quality", "exact"]).0 == exact);
    assert!(convert(&out, "exact", &[]).0 == exact);
    let (balanced, said) = convert(&out, "balanced", &["--print-recipe"]);
    assert!(balanced != exact);
    for word in [
        "quality = \"balanced\"",
        "rounding = \"gptq\"",
        "like = \"q4_k_m\"",
        "builtin",
        "self",
        "transform = \"none\"",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(said.contains("GPTQ with corrected targets (") && said.contains("in all"), "{said}");
    assert!(convert(&out, "exact", &["--quality", "balanced", "--threads", "1"]).0 == balanced);
    // the recipe that was printed repeats the bytes
    let recipe = dir.path().join("r.toml");
    let printed =
        command([&fixture("tiny"), &out]).args(["--dry-run", "--print-recipe", "--quality", "balanced"]).output();
    std::fs::write(&recipe, printed.unwrap().stdout).unwrap();
    assert!(convert(&out, "exact", &["--recipe", recipe.to_str().unwrap()]).0 == balanced);
    // another mix where it is asked for, and less text
    let stock = convert(&out, "exact", &["--quality", "balanced", "--mix", "stock"]).0;
    assert!(stock != balanced && stock != exact);
    let (best, said) = convert(&out, "exact", &["--quality", "best", "--mix", "stock", "--tune", "12"]);
    assert!(best != stock && said.contains("tuned in"), "{said}");
    let (local, said) =
        convert(&out, "exact", &["--quality", "best", "--mix", "stock", "--tune", "12", "--tune-local"]);
    assert!(local != stock && local != best && said.contains("errors of layers"), "{said}");
    let fast = convert(&out, "exact", &["--quality", "fast"]).0;
    assert!(fast != exact && fast != balanced);
    // nothing to gain
    assert!(convert(&out, "balanced", &["-t", "f16"]).0 == convert(&out, "exact", &["-t", "f16"]).0);
}

#[test]
fn a_model_that_does_not_fit_writes_no_text() {
    let Some(shared) = common::shared() else { return };
    let plan = |limit: &str| {
        let mut c = command([Path::new("plan"), &shared.join("models/tiny-llama")]);
        let ran = c.args(["--max-memory", limit]).env("OSTQ_QUALITY", "balanced").output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).into_owned()
    };
    let (small, large) = (plan("300MiB"), plan("8GiB"));
    assert!(small.contains("no text of the model's own") && !small.contains("transforms are measured"), "{small}");
    assert!(!large.contains("no text of the model's own") && large.contains("transforms are measured"), "{large}");
}

/// The fixture with a head of its own, equal to its embedding.
fn untied() -> Checkpoint {
    let checkpoint = Checkpoint::new();
    checkpoint.edit("config.json", |j| drop(j.insert("tie_word_embeddings".into(), false.into())));
    checkpoint.edit_tensors(|all| {
        let embedding = all.iter().find(|t| t.name == "model.embed_tokens.weight").unwrap().clone();
        all.push(Tensor { name: "lm_head.weight".into(), ..embedding });
    });
    checkpoint
}

#[test]
fn rotations_are_measured_where_they_cost_no_head() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a.gguf");
    let own = untied();
    let say = |input: &Path, args: &[&str]| {
        let mut c = command([input, &out]);
        let ran = c.args(args).arg("--force").env("OSTQ_QUALITY", "balanced").output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        (std::fs::read(&out).unwrap(), String::from_utf8_lossy(&ran.stderr).into_owned())
    };
    let (bytes, said) = say(own.path(), &[]);
    let chosen = said.lines().find_map(|l| l.strip_prefix("transform auto: ")).unwrap_or_else(|| panic!("{said}"));
    for line in ["transforms measured (", "transform none: KLD ", "transform quarot: KLD "] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert_eq!(said.matches("the model writes text").count(), 1, "{said}");
    // what is chosen is what is asked for by name
    assert!(say(own.path(), &["--transform", chosen, "--no-provenance"]).0 == say(own.path(), &["--no-provenance"]).0);
    assert!(!bytes.is_empty());
    // what was measured is kept with the state, and a run that goes on there believes it
    say(own.path(), &["--keep-state"]);
    let kept = dir.path().join("a.gguf.ostq-state/auto.json");
    let mut measured: serde_json::Value = serde_json::from_slice(&std::fs::read(&kept).unwrap()).unwrap();
    assert_eq!(measured.as_array().unwrap().len(), 2);
    measured[1][1] = 0.0.into();
    std::fs::write(&kept, measured.to_string()).unwrap();
    let (_, said) = say(own.path(), &[]);
    assert!(said.contains("transform auto: quarot") && !kept.exists(), "{said}");
    // the recipe in the file says what was taken
    let (bytes, _) = say(own.path(), &["--print-recipe"]);
    let recipe = format!("transform = \"{chosen}\"");
    assert!(bytes.windows(recipe.len()).any(|w| w == recipe.as_bytes()), "{recipe}");
    assert!(say(own.path(), &["--quality", "balanced", "--vocab-only"]).1.contains("tokens"));
    let (_, said) = say(own.path(), &["--transform", "none"]);
    assert!(!said.contains("transforms measured") && !said.contains("KLD "), "{said}");
    let (_, said) = say(&fixture("tiny"), &[]);
    assert!(said.contains("transform quarot: not tried: it would give a tied model a head") && !said.contains(": KLD"));
    run([own.path().to_str().unwrap(), out.to_str().unwrap(), "--transform", "auto:quarot,quaro"])
        .exits(2)
        .says("`quaro` is not smoothquant");
}

#[test]
fn a_plan_reads_headers_only() {
    let mut c = command([Path::new("plan"), &fixture("tiny")]);
    let ran = c.env("OSTQ_QUALITY", "balanced").output().unwrap();
    assert!(ran.status.success());
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(said.contains("allocated when the model is converted"), "{said}");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (fixture("tiny"), dir.path().join("x.gguf"));
    let with = |args: &[&str]| run([input.to_str().unwrap(), out.to_str().unwrap()].iter().chain(args));
    with(&["--quality", "good"]).exits(2).says("not exact, fast, balanced or best");
    with(&["--quality", "best", "--exact"]).exits(2).says("--exact is --quality exact");
    with(&["--quality", "best", "--imatrix", "m.gguf"]).exits(2).says("--imatrix does not go with it");
    with(&["--quality", "fast", "--like", "q4_0"]).exits(2).says("neither allocates nor tunes");
    with(&["--quality", "balanced", "--prune-layers", "7"]).exits(2).says("--prune-layers leaves another model");
    with(&["--calibrate", "builtin", "--tune-local"]).exits(2).says("--tune-local needs --tune");
    with(&["--quality", "best", "--max-memory", "20MiB"]).exits(4).says("--quality balanced does without");
    with(&["--time-budget", "5"]).exits(2).says("is no time");
    with(&["--time-budget", "5m", "--quality", "best"]).exits(2).says("--quality");
    with(&["--device", "abacus"]).exits(2).says("abacus");
    assert!(!out.exists());
    let mut c = command([&input, &out]);
    let ran = c.env("OSTQ_QUALITY", "good").output().unwrap();
    assert!(!ran.status.success() && String::from_utf8_lossy(&ran.stderr).contains("OSTQ_QUALITY"));
}

#[test]
fn a_time_budget_chooses() {
    let recipe = |budget: &str| {
        let mut c = command([fixture("tiny")]);
        let ran = c.args(["--dry-run", "--print-recipe", "--time-budget", budget]).output().unwrap();
        assert!(ran.status.success());
        String::from_utf8_lossy(&ran.stdout).into_owned()
    };
    assert!(recipe("0.000001s").contains("quality = \"fast\""));
    let long = recipe("3h");
    assert!(long.contains("quality = \"best\"") && long.contains("tune = 2000"), "{long}");
}
