// SPDX-License-Identifier: Apache-2.0
//! The domain templates in force, and whether they can be used.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
};

use salvor_domain_templates::{
    Templates, TemplatesError, fixtures,
    xml::{Element, Node},
};

use crate::core::errors::chain;
use crate::libvirt::check_schema;

/// A template larger than this is none.
const MAX_BYTES: u64 = 1 << 20;

/// Why the templates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplatesDirError {
    /// The folder or a file in it cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is too large to be a template.
    #[error("{} is larger than 1 MiB, so it is no template", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// They are no templates.
    #[error("the templates cannot be used")]
    Templates(#[from] TemplatesError),
    /// They do not give usable domains.
    #[error("the templates do not give usable domains:\n{}", failures.join("\n"))]
    Unusable {
        /// Each domain that failed, and why.
        failures: Vec<String>,
    },
}

/// The templates: the built-in ones, with those of `folder` (`server.xml`, `rescue.xml`) in their place.
///
/// # Errors
/// [`TemplatesDirError`], but [`TemplatesDirError::Unusable`].
pub fn load_templates(folder: Option<&Path>) -> Result<Templates, TemplatesDirError> {
    let Some(folder) = folder else {
        return Ok(Templates::builtin()?);
    };
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| TemplatesDirError::Read { path, source }
    };
    let mut overrides = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let path = entry.map_err(failed(folder))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if path.extension().is_none_or(|extension| extension != "xml") {
            continue;
        }
        if fs::metadata(&path).map_err(failed(&path))?.len() > MAX_BYTES {
            return Err(TemplatesDirError::TooLarge { path });
        }
        overrides.insert(
            name.to_owned(),
            fs::read_to_string(&path).map_err(failed(&path))?,
        );
    }
    Ok(Templates::with_overrides(overrides)?)
}

/// A mistake in a template is in every domain that it gives: a few of them show it.
const ENOUGH_FAILURES: usize = 3;

/// What a check looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// So many domains were rendered.
    pub rendered: usize,
    /// So many of them were held against libvirt's schema.
    pub validated: usize,
}

/// How much is held against libvirt's schema. Each domain takes 10 ms of CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thoroughness {
    /// Every domain.
    Everything,
    /// Domains until every element, attribute and word that the templates give was in one of them. For
    /// the built-in templates at every start: they passed everything before they were released, and
    /// it is the host's libvirt that may not know a piece of them.
    EachPiece,
}

/// Renders every template with a matrix of servers and rescues, and holds what comes out against
/// libvirt's schema. Blocks, for seconds if it is thorough.
///
/// # Errors
/// [`TemplatesDirError::Unusable`] with every domain that failed.
pub fn check_templates(
    templates: &Templates,
    thoroughness: Thoroughness,
) -> Result<Checked, TemplatesDirError> {
    let mut pieces = HashSet::new();
    let mut checked = Checked {
        rendered: 0,
        validated: 0,
    };
    let mut failures = Vec::new();
    for rendered in fixtures::matrix(templates) {
        if failures.len() == ENOUGH_FAILURES {
            failures.push("  … and perhaps more".to_owned());
            break;
        }
        checked.rendered += 1;
        match rendered.result {
            Ok(xml) if rendered.in_schema => {
                // What cannot be read is libvirt's to refuse.
                let new = Element::parse(&xml)
                    .map_or(true, |domain| add_pieces(&domain, "", &mut pieces));
                if thoroughness == Thoroughness::EachPiece && !new {
                    continue;
                }
                match check_schema(&xml) {
                    Ok(()) => checked.validated += 1,
                    Err(error) => failures.push(format!("  {}: {}", rendered.name, chain(&error))),
                }
            }
            Ok(_) => {}
            Err(error) => failures.push(format!("  {}: {}", rendered.name, chain(&error))),
        }
    }
    if failures.is_empty() {
        Ok(checked)
    } else {
        Err(TemplatesDirError::Unusable { failures })
    }
}

/// Adds the elements, attributes and words of a domain; says whether one of them is new.
fn add_pieces(element: &Element, above: &str, pieces: &mut HashSet<String>) -> bool {
    let path = format!("{above}/{}", element.name);
    let mut new = pieces.insert(path.clone());
    for (name, value) in &element.attributes {
        // A word that libvirt knows; not a name, a number or a path.
        let is_word = value.bytes().all(|byte| byte.is_ascii_lowercase());
        let word = if is_word { value.as_str() } else { "" };
        new |= pieces.insert(format!("{path}@{name}={word}"));
    }
    for child in &element.children {
        if let Node::Element(child) = child
            && child.name != "metadata"
        {
            new |= add_pieces(child, &path, pieces);
        }
    }
    new
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_piece_of_the_templates_is_checked_and_none_many_times() {
        let templates = Templates::builtin().unwrap();
        let checked = check_templates(&templates, Thoroughness::EachPiece).unwrap();
        assert!((5..60).contains(&checked.validated), "{checked:?}");
        let text = include_str!("../../../domain-templates/templates/server.xml");
        let extra = text.replacen("</devices>", "<no-such-device/></devices>", 1);
        let overrides = BTreeMap::from([("server.xml".to_owned(), extra)]);
        let wrong = Templates::with_overrides(overrides).unwrap();
        let error = check_templates(&wrong, Thoroughness::EachPiece).unwrap_err();
        assert!(matches!(error, TemplatesDirError::Unusable { .. }));
    }
}
