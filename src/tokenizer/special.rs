//! Special tokens: their ids, whether bos, eos and sep are added to a text, and the chat template.
//!
//! Follows `SpecialVocab` in `gguf-py/gguf/vocab.py` of llama.cpp b11434 step by step, because its order of insertion is the
//! order of the keys and its reading of post-processors decides over bos and eos.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::Report;
use super::files::Files;
use super::template::{self, Template};
use super::vocab::Vocab;
use crate::checkpoint::{CheckpointError, Config, json};
use crate::gguf::{Metadata, Value, value};

/// The types that are looked for, in order.
pub const TYPES: &[&str] = &["bos", "eos", "unk", "sep", "pad", "cls", "mask"];

/// GGUF keys of the types; `cls` has none and is dropped (sic: "seperator").
const KEYS: &[(&str, &str)] = &[
    ("bos", "bos_token_id"),
    ("eos", "eos_token_id"),
    ("unk", "unknown_token_id"),
    ("sep", "seperator_token_id"),
    ("pad", "padding_token_id"),
    ("mask", "mask_token_id"),
    ("eot", "eot_token_id"),
    ("eom", "eom_token_id"),
    ("prefix", "prefix_token_id"),
    ("suffix", "suffix_token_id"),
    ("middle", "middle_token_id"),
];

/// Where the chat template comes from.
#[derive(Clone, Copy)]
pub enum Override<'a> {
    /// From the folder.
    None,
    /// From this file.
    Template(&'a Path),
    /// It is not wanted.
    NoTemplate,
}

/// What was found, in order of insertion.
#[derive(Debug, Default)]
pub struct SpecialTokens {
    types: Vec<&'static str>,
    ids: Vec<(&'static str, u64)>,
    /// Where each id comes from, to show.
    sources: Vec<(&'static str, &'static str)>,
    add: Vec<(&'static str, bool)>,
    template: Option<Template>,
    lowercase: Option<bool>,
    strip_accents: Option<bool>,
    bound: Option<u64>,
}

impl SpecialTokens {
    /// Reads tokenizer.json, tokenizer_config.json and config.json. `bound`: ids from here on are left out.
    pub fn load(
        files: &Files,
        config: &Config,
        types: &[&'static str],
        bound: Option<u64>,
        template: Override<'_>,
        report: &mut Report,
    ) -> Result<SpecialTokens, CheckpointError> {
        let mut s = SpecialTokens { types: types.to_vec(), bound, ..SpecialTokens::default() };
        let mut tokenizer_config = files.config.clone().unwrap_or_default();
        if let Some(tokenizer) = &files.tokenizer {
            s.normalizer(tokenizer.get("normalizer"), 0);
            let mut names = Names::take(&mut tokenizer_config);
            if let Some(post) = tokenizer.get("post_processor").filter(|p| json::truthy(Some(p))) {
                let single = std::slice::from_ref(post);
                let steps = post.get("processors").and_then(Json::as_array).map_or(single, Vec::as_slice);
                for step in steps {
                    s.post_processor(step, &mut names, &mut tokenizer_config, report);
                }
            }
        }
        s.template = match template {
            Override::Template(file) => Some(template::from_file(file)?),
            Override::NoTemplate => None,
            Override::None => template::load(files, report)?,
        };
        s.read_tokenizer_config(files, &tokenizer_config, report);
        s.read_config(config, report);
        Ok(s)
    }

    /// Sets an id if the type has none yet.
    pub fn set_if_open(&mut self, typ: &'static str, id: u64) {
        if self.id(typ).is_none() {
            self.ids.push((typ, id));
        }
    }

    fn id(&self, typ: &str) -> Option<u64> {
        self.ids.iter().find(|(t, _)| *t == typ).map(|(_, id)| *id)
    }

    fn set_add(&mut self, typ: &'static str, add: bool) {
        match self.add.iter_mut().find(|(t, _)| *t == typ) {
            Some(slot) => slot.1 = add,
            None => self.add.push((typ, add)),
        }
    }

    fn adds(&self, typ: &str) -> Option<bool> {
        self.add.iter().find(|(t, _)| *t == typ).map(|(_, add)| *add)
    }

    fn normalizer(&mut self, normalizer: Option<&Json>, depth: usize) {
        let Some(n) = normalizer else { return };
        match n.get("type").and_then(Json::as_str) {
            Some("Lowercase") => self.lowercase = Some(true),
            Some("StripAccents") => self.strip_accents = Some(true),
            Some("BertNormalizer") => {
                self.lowercase = n.get("lowercase").and_then(Json::as_bool).or(self.lowercase);
                self.strip_accents = n.get("strip_accents").and_then(Json::as_bool).or(self.strip_accents);
            }
            Some("Sequence") if depth < 8 => {
                for part in n.get("normalizers").and_then(Json::as_array).into_iter().flatten() {
                    self.normalizer(Some(part), depth + 1);
                }
            }
            _ => {}
        }
    }

    fn post_processor(&mut self, step: &Json, names: &mut Names, config: &mut Map<String, Json>, report: &mut Report) {
        match step.get("type").and_then(Json::as_str) {
            Some("ByteLevel") => {
                for typ in ["bos", "eos"] {
                    if self.adds(typ).is_none() {
                        self.set_add(typ, false);
                    }
                }
            }
            Some("RobertaProcessing") => {
                for typ in ["bos", "eos", "sep"] {
                    self.set_add(typ, true);
                }
                let first = |key: &str| step.get(key).and_then(|v| v.get(0)).cloned();
                if !names.truthy("cls") && !config.is_empty() {
                    names.set(config, "cls", first("cls").or(names.get("bos")));
                }
                if !names.truthy("sep") && !config.is_empty() {
                    names.set(config, "sep", first("sep").or(names.get("eos")));
                }
            }
            Some("TemplateProcessing") => {
                let ends = self.single(step, names, config, report);
                self.pair(step, ends, names, config, report);
            }
            _ => {}
        }
    }

    /// The template for one text: its first and last special tokens are bos and eos.
    fn single(&mut self, step: &Json, names: &mut Names, config: &mut Map<String, Json>, report: &mut Report) -> Ends {
        let mut ends = Ends { first: None, last: None };
        let single = step.get("single").and_then(Json::as_array).map_or(&[][..], Vec::as_slice);
        let [first, .., last] = single else { return ends };
        if let Some(id) = special_id(first) {
            if config.is_empty() {
                names.values.insert("bos".into(), id.clone());
            } else if !names.is(&["bos", "cls"], &id) {
                for typ in ["bos", "cls"] {
                    if !names.truthy(typ) {
                        names.set(config, typ, Some(id.clone()));
                    }
                }
            }
            let known = names.is(&["bos", "cls"], &id);
            self.set_add("bos", known);
            if !known {
                report.warn(format!("tokenizer.json: the token {id} that is put first is neither bos nor cls"));
            }
            ends.first = Some(id);
        }
        if let Some(id) = special_id(last) {
            if config.is_empty() {
                names.values.insert("eos".into(), id.clone());
            } else if !names.is(&["eos"], &id) {
                // The old eos becomes eot, or eom if there is an eot already.
                match ["eot", "eom"].into_iter().find(|t| !self.types.contains(t)) {
                    Some(typ) => {
                        self.types.push(typ);
                        config.insert(format!("{typ}_token"), names.get("eos").unwrap_or(Json::Null));
                    }
                    None => {
                        report.warn(format!("tokenizer.json: the token {id} that is put last takes the place of eos"))
                    }
                }
                names.set(config, "eos", Some(id.clone()));
            }
            self.set_add("eos", true);
            ends.last = Some(id);
        }
        ends
    }

    /// The template for two texts: whether a separator stands between them.
    fn pair(
        &mut self,
        step: &Json,
        ends: Ends,
        names: &mut Names,
        config: &mut Map<String, Json>,
        report: &mut Report,
    ) {
        let mut pair = step.get("pair").and_then(Json::as_array).map_or(&[][..], Vec::as_slice);
        let end = |item: Option<&Json>, wanted: &Option<Json>| wanted.is_some() && item.and_then(special_id) == *wanted;
        let (starts, stops) = (end(pair.first(), &ends.first), end(pair.last(), &ends.last));
        if !pair.is_empty() && ((ends.first.is_some() && !starts) || (ends.last.is_some() && !stops)) {
            report.warn(
                "tokenizer.json: the templates for one text and for two begin or end with different special tokens",
            );
        }
        if starts {
            pair = &pair[1..];
        }
        if stops && !pair.is_empty() {
            pair = &pair[..pair.len() - 1];
        }
        let sequence =
            |item: &Json| item.get("Sequence").and_then(|s| s.get("id")).and_then(Json::as_str).map(str::to_string);
        let [a, middle @ .., b] = pair else { return };
        if sequence(a).as_deref() != Some("A") || sequence(b).as_deref() != Some("B") || middle.is_empty() {
            return;
        }
        let separates = |item: &Json| special_id(item).is_some_and(|id| names.is(&["sep", "eos"], &id));
        let mut add = separates(&middle[0]) && ends.last.is_none();
        if let [_, second] = middle {
            add |= separates(second);
        }
        self.set_add("sep", add);
        if add && !names.truthy("sep") && !config.is_empty() {
            config.insert("sep_token".into(), names.get("eos").unwrap_or(Json::Null));
        }
    }

    fn read_tokenizer_config(&mut self, files: &Files, config: &Map<String, Json>, report: &mut Report) {
        if config.is_empty() {
            return;
        }
        let added = files.tokenizer.as_ref().and_then(|t| t.get("added_tokens")).and_then(Json::as_array);
        for typ in self.types.clone() {
            if let Some(add) = config.get(&format!("add_{typ}_token")).and_then(Json::as_bool) {
                match self.adds(typ) {
                    None => self.set_add(typ, add),
                    Some(by_template) if by_template != add => report.warn(format!(
                        "tokenizer_config.json says add_{typ}_token {add}, the post-processor of tokenizer.json {by_template}; the latter counts"
                    )),
                    Some(_) => {}
                }
            }
            let content = match config.get(&format!("{typ}_token")) {
                Some(Json::String(s)) => s.as_str(),
                Some(Json::Object(o)) => match o.get("content").and_then(Json::as_str) {
                    Some(s) => s,
                    None => continue,
                },
                _ => continue,
            };
            let entry = added.into_iter().flatten().find(|a| a.get("content").and_then(Json::as_str) == Some(content));
            if let Some(id) = entry.and_then(|a| a.get("id")) {
                self.set(typ, id, "tokenizer_config.json", report);
            }
        }
    }

    fn read_config(&mut self, config: &Config, report: &mut Report) {
        let text_config = config.raw.get("text_config");
        for typ in self.types.clone() {
            let key = format!("{typ}_token_id");
            let at_root = config.raw.get(&key).filter(|v| !v.is_null());
            let Some(id) = at_root.or_else(|| text_config?.get(&key)) else { continue };
            match id {
                Json::Array(list) => self.list(typ, list, report),
                id => self.set(typ, id, "config.json", report),
            }
        }
    }

    /// Several ids for one type. The reference leaves a list out; where nothing else names the token that leaves llama.cpp with
    /// a default id, so the first of the list is taken then.
    fn list(&mut self, typ: &'static str, list: &[Json], report: &mut Report) {
        let shown = Json::Array(list.to_vec());
        match (self.id(typ), list.first()) {
            (Some(id), _) => report
                .say(&format!("{typ} list"), format!("config.json has {shown}; {id} is written, llama.cpp takes one")),
            (None, Some(first)) => {
                report.warn(format!(
                    "config.json: {typ}_token_id is a list, {shown}; the first one is taken, llama.cpp takes one"
                ));
                self.set(typ, first, "config.json", report);
            }
            (None, None) => {}
        }
    }

    fn set(&mut self, typ: &'static str, id: &Json, source: &'static str, report: &mut Report) {
        let Some(n) = json::as_integer(id) else { return };
        if self.id(typ).is_some() {
            return;
        }
        let bound = self.bound.unwrap_or(1 << 32);
        if n < 0 || n >= bound.into() {
            let range = if self.bound.is_some() { format!("0 to {}", bound - 1) } else { "32 bits".into() };
            report.warn(format!("{source}: the {typ} token has the id {n}, which is not within {range}; left out"));
            return;
        }
        self.ids.push((typ, n as u64));
        self.sources.push((typ, source));
    }

    /// Writes the keys, and says what they are.
    pub fn write(&self, metadata: &mut Metadata, vocab: &Vocab, report: &mut Report) {
        for (typ, id) in &self.ids {
            let Some((_, key)) = KEYS.iter().find(|(t, _)| t == typ) else { continue };
            value::set(metadata, &format!("tokenizer.ggml.{key}"), Value::U32(*id as u32));
            if *id >= vocab.tokens.len() as u64 {
                report.warn(format!(
                    "the {typ} token has the id {id}, but there are {} tokens; llama.cpp leaves it out",
                    vocab.tokens.len()
                ));
            }
            if matches!(*typ, "bos" | "eos" | "eot" | "eom") {
                let source = self.sources.iter().find(|(t, _)| t == typ).map_or("", |(_, s)| s);
                report.say(typ, format!("{id} `{}` ({source})", vocab.show(*id)));
            }
        }
        for (typ, add) in &self.add {
            if matches!(*typ, "bos" | "eos" | "sep") {
                value::set(metadata, &format!("tokenizer.ggml.add_{typ}_token"), Value::Bool(*add));
            }
        }
        match &self.template {
            Some(template) => template.write(metadata, report),
            None => report.say("chat template", "none"),
        }
        for (key, flag) in [("lowercase", self.lowercase), ("strip_accents", self.strip_accents)] {
            if let Some(flag) = flag {
                value::set(metadata, &format!("tokenizer.ggml.normalizer.{key}"), Value::Bool(flag));
            }
        }
    }
}

/// First and last special token of a template.
struct Ends {
    first: Option<Json>,
    last: Option<Json>,
}

/// The id (a token text) of a special token in a template; an empty one is none.
fn special_id(item: &Json) -> Option<Json> {
    item.get("SpecialToken")?.get("id").filter(|id| json::truthy(Some(id))).cloned()
}

/// bos, cls, eos and sep as tokenizer_config.json has them (texts or objects), changed as templates are read.
struct Names {
    values: Map<String, Json>,
}

impl Names {
    /// cls stands in for a missing bos, sep for a missing eos.
    fn take(config: &mut Map<String, Json>) -> Names {
        let mut names = Names { values: Map::new() };
        for typ in ["bos", "cls", "eos", "sep"] {
            if let Some(v) = config.get(&format!("{typ}_token")) {
                names.values.insert(typ.into(), v.clone());
            }
        }
        for (typ, other) in [("bos", "cls"), ("eos", "sep")] {
            if !names.truthy(typ) && names.truthy(other) && !config.is_empty() {
                let value = names.get(other);
                names.set(config, typ, value);
            }
        }
        names
    }

    fn get(&self, typ: &str) -> Option<Json> {
        self.values.get(typ).cloned()
    }

    fn truthy(&self, typ: &str) -> bool {
        json::truthy(self.values.get(typ))
    }

    fn is(&self, types: &[&str], id: &Json) -> bool {
        types.iter().any(|t| self.values.get(*t) == Some(id))
    }

    fn set(&mut self, config: &mut Map<String, Json>, typ: &str, value: Option<Json>) {
        let value = value.unwrap_or(Json::Null);
        config.insert(format!("{typ}_token"), value.clone());
        self.values.insert(typ.into(), value);
    }
}
