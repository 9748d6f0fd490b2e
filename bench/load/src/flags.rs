//! Owns reading the command line: `--name value` and `--switch`. Knows no command.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// The switches; every other flag has a value.
const SWITCHES: [&str; 1] = ["resume"];

/// Flags that nobody has asked for yet.
pub struct Flags(BTreeMap<String, String>);

impl Flags {
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut flags = BTreeMap::new();
        while let Some(argument) = arguments.next() {
            let name = argument.strip_prefix("--").ok_or(format!("{argument:?}: expected a --flag"))?;
            let value = match SWITCHES.contains(&name) {
                true => String::new(),
                false => arguments.next().ok_or(format!("--{name}: expected a value"))?,
            };
            if flags.insert(name.to_owned(), value).is_some() {
                return Err(format!("--{name} is given twice"));
            }
        }
        Ok(Self(flags))
    }

    pub fn switch(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    pub fn text(&mut self, name: &str) -> Result<String, String> {
        self.0.remove(name).ok_or(format!("--{name} is missing"))
    }

    pub fn number<T>(&mut self, name: &str, preset: T, range: RangeInclusive<T>) -> Result<T, String>
    where
        T: FromStr + PartialOrd + Display,
    {
        Ok(self.number_if_given(name, range)?.unwrap_or(preset))
    }

    pub fn number_if_given<T>(&mut self, name: &str, range: RangeInclusive<T>) -> Result<Option<T>, String>
    where
        T: FromStr + PartialOrd + Display,
    {
        let Some(text) = self.0.remove(name) else { return Ok(None) };
        let number = text.parse().ok().filter(|number| range.contains(number)).ok_or(format!(
            "--{name} {text}: expected a number from {} to {}",
            range.start(),
            range.end()
        ))?;
        Ok(Some(number))
    }

    /// One of a few words; the first is the preset.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<T, String> {
        let given = self.0.remove(name);
        let text = given.as_deref().unwrap_or(choices[0].0);
        let found = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        found.ok_or_else(|| {
            let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
            format!("--{name} {text}: expected one of {}", words.join(", "))
        })
    }

    /// Load belongs on this host only: a typing error must not become somebody else's outage.
    pub fn loopback(&mut self, name: &str, preset: Option<&str>) -> Result<Vec<SocketAddr>, String> {
        let given = self.0.remove(name);
        let list = given.as_deref().or(preset).ok_or(format!("--{name} is missing"))?;
        list.split(',').map(|text| loopback_address(name, text)).collect()
    }

    pub fn refuse_unknown(&self) -> Result<(), String> {
        match self.0.keys().next() {
            Some(name) => Err(format!("--{name} is unknown here")),
            None => Ok(()),
        }
    }
}

fn loopback_address(name: &str, text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| format!("--{name} {text}: expected IP:PORT"))?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err(format!("--{name} {text}: only loopback addresses are allowed")),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn flags(line: &str) -> Flags {
        Flags::parse(line.split_whitespace().map(str::to_owned)).expect(line)
    }

    #[test]
    fn only_loopback_addresses_are_taken() {
        for allowed in ["127.0.0.1:1", "127.8.9.10:443", "[::1]:443", "127.0.0.1:1,127.0.0.2:1"] {
            assert!(flags(&format!("--to {allowed}")).loopback("to", None).is_ok(), "{allowed}");
        }
        for refused in [
            "0.0.0.0:443",
            "192.0.2.1:443",
            "[::]:443",
            "[2001:db8::1]:443",
            "localhost:443",
            "127.0.0.1",
            "127.0.0.1:1,192.0.2.1:443",
            "127.0.0.1:1,",
        ] {
            assert!(flags(&format!("--to {refused}")).loopback("to", None).is_err(), "{refused}");
        }
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        for (text, allowed) in [("0", false), ("1", true), ("600", true), ("601", false), ("x", false)] {
            let found = flags(&format!("--seconds {text}")).number("seconds", 3.0, 1.0..=600.0);
            assert_eq!(found.is_ok(), allowed, "{text}");
        }
    }

    #[test]
    fn a_choice_is_one_of_its_words_and_the_first_when_not_given() {
        let choices = [("up", 1), ("down", 2)];
        assert_eq!(flags("").choice("direction", &choices), Ok(1));
        assert_eq!(flags("--direction down").choice("direction", &choices), Ok(2));
        assert!(flags("--direction left").choice("direction", &choices).is_err());
    }

    #[test]
    fn a_flag_that_nobody_knows_is_refused() {
        let mut flags = flags("--resume --to 127.0.0.1:1");
        assert!(flags.switch("resume"));
        assert!(flags.refuse_unknown().is_err());
        assert!(flags.loopback("to", None).is_ok());
        assert!(flags.refuse_unknown().is_ok());
    }
}
