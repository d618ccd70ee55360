//! What the holder of a key may do: the words after the secret in a server's key file.
//!
//! | word | says |
//! |---|---|
//! | `role=read` | open tables and read them, as an *observer* ([`fervor_protocol::clock`]): no clock waits for it. (A table that it makes by that, and nobody updates, is gone when it closes it) |
//! | `role=train` | update them, too; without a role as well |
//! | `clients=N` | at most so many clients with it at a time, at each server; without it as many as there are places |
//! | `tables=GLOB` | tables whose name fits alone; `*` stands for any characters, as in `tables=team-a/*`. It may be given several times |
//!
//! **What this keeps.** A client opens and updates what it may, and nothing else; what it asks for besides is refused with the reason.
//! Whoever connects has a place among `--clients`, as many as its `clients=N` allows, and takes memory for the tables that it opens. Who may only read holds nobody's
//! clock back.
//!
//! **READs.** Rows of all tables of a shard lie in one region. Over RDMA a client READs it without an instruction of the server, and in shared
//! memory it maps it as a whole: whoever is let in can reach every row, if he goes round the library. So a key with `tables=` comes
//! by TCP alone, where the server's transport looks at each READ and refuses what is not a row of these tables ([`reach`](crate::reach)).
//! Tenants that must not read each other, and want RDMA, need servers of their own.

use std::fmt;

use fervor_protocol::wire::Hello;
use fervor_verbs::session::{Key, KeyRing};

/// What a client may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    key: String,
    updates: bool,
    /// Most clients at a time.
    clients: usize,
    /// Names of tables; none: all.
    tables: Vec<String>,
}

/// A rule of a key that cannot be understood.
#[derive(Debug, PartialEq, Eq)]
pub struct BadRule {
    key: String,
    rule: String,
}

impl fmt::Display for BadRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, rule } = self;
        write!(
            f,
            "key `{key}`: `{rule}` is no rule; there are role=read, role=train, clients=N with N from 1 on, and \
             tables=NAME, as in tables=team-a/*"
        )
    }
}

impl Default for Grant {
    /// Everything: where there are no keys.
    fn default() -> Self {
        Self { key: String::new(), updates: true, clients: usize::MAX, tables: Vec::new() }
    }
}

impl Grant {
    /// What the holder of `key` may do.
    ///
    /// # Errors
    /// A rule that is none.
    pub fn of(key: &Key) -> Result<Self, BadRule> {
        let mut grant = Self { key: key.name().to_owned(), ..Self::default() };
        for rule in key.rules() {
            match rule.split_once('=') {
                Some(("role", "read")) => grant.updates = false,
                Some(("role", "train")) => grant.updates = true,
                Some(("clients", number)) => match number.parse() {
                    Ok(number) if number > 0 => grant.clients = number,
                    _ => return Err(BadRule { key: key.name().to_owned(), rule: rule.clone() }),
                },
                Some(("tables", glob)) if !glob.is_empty() => grant.tables.push(glob.to_owned()),
                _ => return Err(BadRule { key: key.name().to_owned(), rule: rule.clone() }),
            }
        }
        Ok(grant)
    }

    /// Whether it may use some tables alone.
    pub fn is_limited(&self) -> bool {
        !self.tables.is_empty()
    }

    /// Whether a client that says this is an observer: because it wants to be, or because it may be nothing else.
    pub fn observes(&self, hello: &Hello) -> bool {
        !self.updates || hello.observes == 1
    }

    /// The name of its key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Most clients that it lets in at a time.
    pub fn clients(&self) -> usize {
        self.clients
    }

    /// Whether it may open the table of that name.
    ///
    /// # Errors
    /// Why not, for the client's user.
    pub fn opens(&self, table: &str) -> Result<(), String> {
        let Self { key, tables, .. } = self;
        if !tables.is_empty() && !tables.iter().any(|glob| fits(glob, table)) {
            return Err(format!(
                "the key `{key}` may use tables={}, and `{table}` is none of them",
                tables.join(" tables=")
            ));
        }
        Ok(())
    }

    /// Why a batch of an observer is refused.
    pub fn no_updates(&self) -> String {
        if self.updates {
            return "the client said that it only reads (ClientOptions::observer), and this is an update"
                .into();
        }
        format!("the key `{}` may read (role=read), and this is an update", self.key)
    }
}

/// The keys of a server: their rules are checked, and who is limited to tables comes by TCP alone.
///
/// # Errors
/// A rule that is none.
pub fn checked(mut keys: KeyRing) -> Result<KeyRing, BadRule> {
    keys.keys().iter().try_for_each(|key| Grant::of(key).map(drop))?;
    keys.limit(|key| Grant::of(key).is_ok_and(|grant| grant.is_limited()));
    Ok(keys)
}

/// Whether `text` fits `glob`, in which `*` stands for any characters.
fn fits(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().expect("a split has a part");
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut last = None;
    for part in parts {
        // A part between two stars may as well be where it first occurs.
        if let Some(part) = last.replace(part) {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
    }
    last.map_or(rest.is_empty(), |last| rest.ends_with(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(rules: &str) -> Result<Grant, BadRule> {
        Grant::of(&format!("k {} {rules}", "ab".repeat(32)).parse().unwrap())
    }

    #[test]
    fn globs_fit_what_they_say() {
        for (glob, text, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("", "", true),
            ("*", "", true),
            ("*", "anything", true),
            ("a*", "a", true),
            ("a*", "ba", false),
            ("*a", "cba", true),
            ("*a", "ab", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*c", "a1b2b3c", true),
            ("a*b*c", "a1c2b", false),
            ("a*bc*c", "abc", false),
            ("**", "x", true),
            ("team-a/*", "team-a/L", true),
            ("team-a/*", "team-b/L", false),
        ] {
            assert_eq!(fits(glob, text), expected, "{glob} and {text}");
        }
    }

    #[test]
    fn rules_say_what_a_key_may_do() {
        assert_eq!(Grant::default().opens("x"), Ok(()));
        let (part, mut observer) = (Hello::main(0), Hello::main(0));
        observer.observes = 1;
        for trainer in [grant("").unwrap(), grant("role=train").unwrap(), Grant::default()] {
            assert!(!trainer.observes(&part) && trainer.observes(&observer));
        }
        let reader = grant("role=read tables=a/* tables=b").unwrap();
        assert!(reader.observes(&part) && reader.observes(&observer));
        assert_eq!(reader.opens("a/L"), Ok(()));
        assert_eq!(reader.opens("b"), Ok(()));
        let error = reader.opens("c").unwrap_err();
        assert!(error.contains("`c`") && error.contains("tables=a/* tables=b"), "{error}");
        assert_eq!((reader.clients(), grant("clients=3").unwrap().clients()), (usize::MAX, 3));
        for rule in ["role=admin", "tables=", "x", "role", "clients=0", "clients=-1", "clients="] {
            let error = grant(rule).unwrap_err().to_string();
            assert!(error.contains(&format!("`{rule}`")) && error.contains("role=read"), "{error}");
        }
    }
}
